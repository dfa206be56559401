"""The stored workflows that keep the best of several."""

from graphs import fresh, the


def best(run, prompt) -> int:
    """The first candidate in the table that the node shows."""
    _, first, *_ = run.outputs[the(prompt, "GLMImageKeepBest")]["text"]
    return int(first.split()[1])


def test_the_layout_with_the_best_score_is_painted(client, picture) -> None:
    prompt = fresh(name="best_of_eight_layouts")
    run = client.run(prompt)
    chosen = best(run, prompt)
    kept = picture(prompt)
    lock = prompt[the(prompt, "GLMImageLockLayout")]["inputs"]
    lock["layout"] = [the(prompt, "GLMImageSampleLayout"), 0]
    lock["batch_index"] = chosen
    assert (picture(prompt) == kept).all()
    lock["batch_index"] = (chosen + 1) % 8
    assert (picture(prompt) != kept).any()


def test_the_picture_with_the_best_text_is_painted_again(client, picture) -> None:
    prompt = fresh(name="best_text_of_four", weight=0.5)
    read = prompt[the(prompt, "GLMImageReadText")]["inputs"]
    del read["prompt"]
    read["texts"] = "OPEN"
    run = client.run(prompt)
    chosen = best(run, prompt)
    kept = picture(prompt)
    again = fresh(name="text_to_image")
    for name in ("GLMImageSampleTokens", "GLMImageApplyTokens", "GLMImageDecode"):
        own = [key for key, node in prompt.items() if node["class_type"] == name][-1]
        inputs = again[the(again, name)]["inputs"]
        inputs |= {k: v for k, v in prompt[own]["inputs"].items() if not isinstance(v, list)}
    again[the(again, "GLMImageApplyTokens")]["inputs"]["batch_index"] = chosen
    again[the(again, "PrimitiveStringMultiline")]["inputs"] = prompt["5"]["inputs"]
    assert (picture(again) == kept).all()
