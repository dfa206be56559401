"""Attending to references: against diffusers' cache, and against recomputing at every step."""

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from glm_image.glm_core.decoder.model import Decoder
from test_decoder import inputs, pair, relative_error
from torch import Tensor

GRIDS = ((4, 6), (3, 5))


def reference_images(config) -> list[dict]:
    """Latent, tokens and size of references with different grids."""
    out = []
    for rows, cols in GRIDS:
        args = inputs(config, rows, cols, batch=1)
        out.append({key: args[key] for key in ("x", "tokens", "size")})
    return out


def cached(decoder: Decoder, images: list[dict]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each block, one set: the images' keys and values one after the other."""
    blocks = [
        decoder.reference_keys_values(image["x"], image["tokens"], image["size"])
        for image in images
    ]
    return [
        [tuple(torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))]
        for pairs in zip(*blocks, strict=True)
    ]


def reference_cache(reference, image_sets: list[list[dict]]) -> GlmImageKVCache:
    cache = GlmImageKVCache(len(reference.transformer_blocks))
    cache.set_mode("write")
    for images in image_sets:
        for image in images:
            ids = image["tokens"].flatten(1)
            reference(
                hidden_states=image["x"],
                encoder_hidden_states=torch.zeros(1, 0, reference.config.text_embed_dim),
                prior_token_id=ids,
                prior_token_drop=torch.zeros_like(ids, dtype=torch.bool),
                timestep=torch.zeros(1),
                target_size=torch.tensor([image["size"]]),
                crop_coords=torch.zeros(1, 2),
                kv_caches=cache,
            )
        cache.next_sample()
    cache.set_mode("read")
    return cache


def reference_prediction(reference, args: dict, cache: GlmImageKVCache) -> Tensor:
    batch, ids = args["x"].shape[0], args["tokens"].flatten(1)
    return reference(
        hidden_states=args["x"],
        encoder_hidden_states=args["glyphs"],
        prior_token_id=ids,
        prior_token_drop=torch.zeros_like(ids, dtype=torch.bool),
        timestep=args["timestep"],
        target_size=torch.tensor([args["size"]] * batch, dtype=torch.float32),
        crop_coords=torch.zeros(batch, 2),
        kv_caches=cache,
        return_dict=False,
    )[0]


def test_one_and_two_references_equal_diffusers_cache() -> None:
    for shape in ("small", "other channels", "patch of 1"):
        ours, reference = pair(shape)
        args = inputs(ours.config, 5, 4)
        images = reference_images(ours.config)
        for some in (images[:1], images):
            expected = reference_prediction(reference, args, reference_cache(reference, [some]))
            assert relative_error(ours(**args, references=cached(ours, some)), expected) < 1e-5
            assert relative_error(ours(**args), expected) > 1e-3


def test_order_of_references_does_not_matter() -> None:
    ours, _ = pair("small")
    args, images = inputs(ours.config, 5, 4), reference_images(ours.config)
    forward, backward = (cached(ours, order) for order in (images, images[::-1]))
    assert (
        relative_error(ours(**args, references=forward), ours(**args, references=backward)) < 1e-5
    )


def test_each_sample_attends_to_its_own_set() -> None:
    """Sets of different lengths, which the reference cannot batch; four samples on two sets."""
    ours, _ = pair("small")
    args = inputs(ours.config, 5, 4, batch=2)
    args = {key: v if key == "size" else torch.cat([v, v.flip(0)]) for key, v in args.items()}
    sets = [cached(ours, [image]) for image in reference_images(ours.config)]
    together = [[*first, *second] for first, second in zip(*sets, strict=True)]
    out = ours(**args, references=together)
    for i in range(4):
        one = {key: v if key == "size" else v[i : i + 1] for key, v in args.items()}
        alone = ours(**one, references=sets[i % 2])
        assert relative_error(out[i : i + 1], alone) < 1e-5
        assert relative_error(out[i : i + 1], ours(**one, references=sets[1 - i % 2])) > 1e-3


def test_cached_equals_recomputing_inside_the_step() -> None:
    """The cache is exactly what full attention over references computes anew at every step."""
    ours, _ = pair("small")
    args, images = inputs(ours.config, 5, 4), reference_images(ours.config)
    stored = cached(ours, images)
    for timestep in (999.0, 12.0):
        args["timestep"] = torch.full((2,), timestep)
        again = ours(**args, references=cached(ours, images))
        assert torch.equal(ours(**args, references=stored), again)
