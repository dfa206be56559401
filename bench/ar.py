"""The AR model: whole grids, one step, a block of ids, batches, and lookahead."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from glm_core.ar.cache import BlockPass, span_of, step_mask
from glm_core.ar.choice import Chooser, plainly
from glm_core.ar.graphs import CudaGraphs
from glm_core.ar.model import ARModel, rope_table
from glm_core.ar.operations import attend_to_span
from glm_core.ar.philox import batch_seeds
from glm_core.ar.prompt import Prompt
from glm_core.ar.replay import EagerRunner, ReplayRunner, Runner
from glm_core.ar.sampler import SamplingRun, sample_tokens
from glm_core.ar.step import SamplingOptions, StepBuffers, StepShape, set_target, step
from glm_core.data.grids import Grid, preview_grid, text_positions, token_grid
from glm_core.quant.packing import FORMATS
from scripts.measure_quantised import quantised

from .measure import Bench, Row
from .networks import ar_pair
from .presets import Preset

PROMPT_LENGTH = 40
LAYOUTS = 8
LOOKAHEAD = 8


def measure(preset: Preset, bench: Bench) -> Iterator[Row]:
    ours, reference = ar_pair(preset.ar, bench.device, preset.ar_dtype)
    ar = ARBench(bench, ours, reference, preset.ar_dtype)
    ar.require_agreement()
    yield from ar.step_rows(token_grid(*preset.sizes[0]))
    yield from ar.quantised_rows(token_grid(*preset.sizes[0]))
    for size in preset.sizes:
        yield ar.attention_row(token_grid(*size))
    yield ar.block_row(preset.block)
    if preset.generate:
        for size in preset.sizes:
            for batch in preset.batches:
                yield from ar.grid_rows(token_grid(*size), batch, preset.reference_cells)
    yield ar.batch_row(token_grid(*preset.sizes[0]))
    yield ar.ahead_row(token_grid(*preset.sizes[0]))
    if preset.generate:
        yield from ar.lookahead_rows(token_grid(*preset.sizes[0]))


class ARBench:
    def __init__(self, bench: Bench, ours: ARModel, reference, dtype: torch.dtype) -> None:
        self.bench = bench
        self.ours = ours
        self.reference = reference
        self.dtype = dtype
        self.runner = self.new_runner()
        self.choose: Chooser = plainly
        config = ours.config
        generator = torch.Generator().manual_seed(0)
        first, last = config.visual_size + 2, config.vocab_size  # plain text ids only
        ids = torch.randint(first, last, (PROMPT_LENGTH,), generator=generator)
        self.prompt = Prompt(ids, text_positions(PROMPT_LENGTH))

    def new_runner(self) -> Runner:
        if self.bench.on_cpu:
            return EagerRunner()
        return ReplayRunner(partial(CudaGraphs, self.bench.device))

    def run(self, batch: int = 1, **how) -> SamplingRun:
        options = how.pop("options", SamplingOptions())
        how = {"runner": self.runner, "choose": self.choose} | how
        return SamplingRun(batch_seeds(0, batch), options, self.bench.device, self.dtype, **how)

    def generate(self, grid: Grid, batch: int, cells: int, greedy: bool = False) -> Tensor:
        """Tokens int64 [batch, cells] of `transformers.generate`, limited to semantic tokens."""
        config, device = self.ours.config, self.bench.device
        legal = GenerationConfig(
            do_sample=not greedy, temperature=None if greedy else 0.9,
            top_p=None if greedy else 0.75, top_k=None if greedy else config.visual_size,
            eos_token_id=config.image_end, pad_token_id=config.visual_size,
            suppress_tokens=list(range(config.codebook, config.visual_size)),
            min_new_tokens=cells, max_new_tokens=cells,
        )  # fmt: skip
        ids = self.prompt.ids.to(device).expand(batch, -1)
        grids = torch.tensor([[1, *grid], [1, *preview_grid(grid)]] * batch, device=device)
        written = self.reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            image_grid_thw=grids,
            images_per_sample=torch.tensor([2] * batch, device=device),
            generation_config=legal,
        )
        return written[:, PROMPT_LENGTH:]

    def require_agreement(self) -> None:
        """Compares greedy tokens, so that both sides are timed on the same work.

        Raises:
            RuntimeError: the tokens differ.
        """
        grid = (2, 2)
        theirs = self.generate(grid, 1, 8, greedy=True)
        _, preview = sample_tokens(
            self.ours, self.prompt, grid, self.run(options=SamplingOptions(0))
        )
        ours = preview.flatten()[:8]
        same = (theirs.flatten() == ours).sum().item()
        if same < (8 if self.dtype == torch.float32 else 1):  # bf16 rounding ends the agreement
            raise RuntimeError(f"The AR models disagree: {ours.tolist()}, {theirs.tolist()}.")

    def grid_rows(self, grid: Grid, batch: int, reference_cells: int) -> Iterator[Row]:
        cells = math.prod(grid) + math.prod(preview_grid(grid))
        their_cells = min(cells, reference_cells)
        name = f"AR, {grid[1] * 32}x{grid[0] * 32}, batch {batch}"

        def ours():
            return sample_tokens(self.ours, self.prompt, grid, self.run(batch))

        def theirs():
            return self.generate(grid, batch, their_cells)

        yield self.bench.row(
            name,
            ours,
            theirs,
            unit="tokens/s",
            work=batch * cells,
            reference_work=batch * their_cells,
            floor_seconds=self.weight_read_seconds() * cells,
        )
        yield self.bench.memory(name, ours, theirs)

    def step_rows(self, grid: Grid) -> Iterator[Row]:
        """One token in the middle of the sequence, and the share of its linear layers."""
        ours, linears = self.our_step(grid, 1), self.linear_layers()
        theirs = self.their_step(self.middle(grid))
        yield self.bench.row("AR step", ours, theirs, floor_seconds=self.weight_read_seconds())
        yield self.bench.row("AR step, beside its linear layers alone", ours, linears)
        yield self.bench.row("transformers' step, beside the linear layers alone", theirs, linears)

    @staticmethod
    def middle(grid: Grid) -> int:
        """A position halfway through the tokens to write."""
        return PROMPT_LENGTH + (math.prod(grid) + math.prod(preview_grid(grid))) // 2

    def quantised_rows(self, grid: Grid) -> Iterator[Row]:
        """A step with quantised weights, against our own step in bf16."""
        if self.dtype != torch.bfloat16:
            return
        for name in FORMATS:
            packed = self.our_step(grid, 1, quantised(self.ours, name, self.bench.device))
            yield self.bench.row(
                f"AR step, {name} weights, beside bf16", packed, self.our_step(grid, 1)
            )

    def our_step(
        self,
        grid: Grid,
        batch: int,
        model: ARModel | None = None,
        width: int = 1,
        run_step: Callable[[ARModel, StepBuffers, int], None] = step,
    ) -> Callable[[], None]:
        model = self.ours if model is None else model
        runner, span = self.new_runner(), span_of(self.middle(grid) + width)
        buffers = self.step_buffers(runner, model, grid, batch, width)
        return lambda: runner.run(lambda: run_step(model, buffers, span), span)

    def step_buffers(
        self, runner: Runner, model: ARModel, grid: Grid, batch: int = 1, width: int = 1
    ) -> StepBuffers:
        """Buffers with a target in the middle of the sequence."""
        at = self.middle(grid)
        shape = StepShape(
            batch, 2 * at, max(grid[1], preview_grid(grid)[1]), span_of(2 * at),
            SamplingOptions(), self.bench.device, self.dtype, width,
        )  # fmt: skip
        buffers = runner.buffers(model, shape)
        positions = text_positions(shape.length).to(self.bench.device)
        buffers.rope.copy_(rope_table(self.ours.config, positions, self.dtype))
        set_target(buffers, at - PROMPT_LENGTH + 1, 0, at, width)
        return buffers

    def their_step(self, length: int) -> Callable[[], Tensor]:
        """transformers' forward of one id on a cache of `length` positions, and its sampling."""
        device = self.bench.device
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        positions = torch.arange(length, device=device).expand(3, 1, length)
        prefill = self.reference(input_ids=ids, position_ids=positions, use_cache=True)
        cache = prefill.past_key_values
        one_id = torch.zeros(1, 1, dtype=torch.long, device=device)
        position = torch.full((3, 1, 1), length, device=device)

        def read_one() -> Tensor:
            logits = self.reference(
                input_ids=one_id, position_ids=position, past_key_values=cache, use_cache=True
            ).logits[:, -1]
            cache.crop(-1)
            scores = logits.float() / 0.9
            ascending, order = scores.sort(dim=-1)
            drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 0.25
            scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
            return torch.multinomial(scores.softmax(dim=-1), 1)

        return read_one

    def attention_row(self, grid: Grid) -> Row:
        """The last step's attention in all layers, against matrix products and a softmax."""
        config, runners = self.ours.config, (self.new_runner(), self.new_runner())
        factory_kwargs = {"device": self.bench.device, "dtype": self.dtype}
        span = span_of(PROMPT_LENGTH + math.prod(grid) + math.prod(preview_grid(grid)))
        layers = self.ours.new_cache(1, span, **factory_kwargs).layers
        sharing = config.heads // config.kv_heads
        q = torch.zeros(1, config.kv_heads, sharing, config.head_dim, **factory_kwargs)
        mask = step_mask(torch.tensor([span - 1], device=self.bench.device), sharing, span, q.dtype)

        def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            scores = q * q.shape[-1] ** -0.5 @ k.mT + mask
            return scores.softmax(dim=-1) @ v

        def over_layers(attend: Callable[..., Tensor]) -> Callable[[], None]:
            return lambda: [attend(q, k, v, mask) for k, v in layers]

        steps = [over_layers(attend) for attend in (attend_to_span, products)]
        ours, theirs = (partial(r.run, s, span) for r, s in zip(runners, steps, strict=True))
        return self.bench.row(
            f"attention of an AR step to {span} positions, beside products and a softmax",
            ours,
            theirs,
        )

    def linear_layers(self) -> Callable[[], None]:
        """A function that runs a step's linear layers, each on one row, and nothing else."""
        layers = [m for m in self.ours.modules() if isinstance(m, torch.nn.Linear)]
        factory_kwargs = {"device": self.bench.device, "dtype": self.dtype}
        inputs = [torch.zeros(1, 1, layer.in_features, **factory_kwargs) for layer in layers]

        def linears() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                F.linear(x, layer.weight, layer.bias)

        return linears

    def weight_read_seconds(self) -> float:
        """Seconds to read every weight of a step once at the device's bandwidth."""
        weights = sum(p.nbytes for n, p in self.ours.named_parameters() if "embed_tokens" not in n)
        return weights / self.bench.bandwidth()

    def block_row(self, length: int) -> Row:
        """`length` ids in one pass, as a prompt or a locked layout is read."""
        device = self.bench.device
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        positions = torch.arange(length, device=device)
        rope = rope_table(self.ours.config, positions.expand(3, -1), self.dtype)
        cache = self.ours.new_cache(1, length, device, self.dtype)

        def ours():
            return self.ours(ids, rope, BlockPass(cache, 0), self.dtype)

        def theirs():
            return self.reference(
                input_ids=ids, position_ids=positions.expand(3, 1, -1), logits_to_keep=1
            )

        return self.bench.row(f"AR, {length} ids in one pass", ours, theirs, rounds=3)

    def batch_row(self, grid: Grid) -> Row:
        """A step of LAYOUTS samples, as for a contact sheet, against as many steps of one."""
        together, alone = (self.our_step(grid, batch) for batch in (LAYOUTS, 1))
        return self.bench.row(
            f"AR step of {LAYOUTS} samples, beside {LAYOUTS} steps of one",
            together,
            lambda: [alone() for _ in range(LAYOUTS)],
            rounds=5,
        )

    def ahead_row(self, grid: Grid) -> Row:
        """A step of LOOKAHEAD cells against a step of one cell.

        Its ratio times the tokens that such a step writes is the gain of lookahead.
        """
        return self.bench.row(
            f"AR step of {LOOKAHEAD} cells, beside a step of one",
            self.our_step(grid, 1, width=LOOKAHEAD),
            self.our_step(grid, 1),
            rounds=5,
        )

    def lookahead_rows(self, grid: Grid) -> Iterator[Row]:
        """Lookahead against one cell a pass; guesses are worse with random weights than trained."""
        for name, options in (("sampled", SamplingOptions()), ("greedy", SamplingOptions(0))):

            def write(ahead: int, options: SamplingOptions = options) -> Tensor:
                how = self.run(options=options, lookahead=ahead)
                return sample_tokens(self.ours, self.prompt, grid, how)[0]

            passes: list[int] = []
            run = self.run(
                options=options, lookahead=LOOKAHEAD, check_interrupt=lambda p=passes: p.append(1)
            )
            tokens, preview = sample_tokens(self.ours, self.prompt, grid, run)
            each = (tokens.numel() + preview.numel()) / len(passes)
            yield self.bench.row(
                f"lookahead {LOOKAHEAD}, {name}: {each:.2f} tokens a pass",
                lambda: write(LOOKAHEAD),
                lambda: write(1),
                rounds=3,
            )
