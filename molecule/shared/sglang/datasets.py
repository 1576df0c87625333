"""Stands for Hugging Face's package of this name, which sglang.bench_serving imports for data sets of others."""


def load_dataset(*_: object, **__: object) -> None:
    raise RuntimeError("the test image has no data sets: use --dataset-name random-ids")
