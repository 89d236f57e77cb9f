"""A recipe of three systems, two tasks and two seeds over the small world's files: what the tests of `run` stand on."""

import pytest

TASK = '''
[[task]]
name = "jobs"
train = { file = ["train.jsonl"], text = "hard_text", label = "profession", group = "gender" }
dev = { file = ["dev.jsonl"], text = "hard_text", label = "profession", group = "gender" }
test = { file = ["test.jsonl"], text = "hard_text", label = "profession", group = "gender" }
epochs = 20
lr = 1e-3
measures = ["classification", "counterfactual"]
'''
RECIPE = '''
title = "small"
axis = "gender"
seeds = 2
[upstream]
train_of = "jobs"
steps = 30
valid_every = 20
lr = 1e-2
batch_size = 16
max_length = 100
measures = ["crows-pairs=PAIRS"]
''' + TASK + '''
[[task]]
name = "moved"
stage = "transfer"
train = { file = ["binary.csv"], text = "text", label = "is_health" }
test = { file = ["binary.csv"], text = "text", label = "is_health" }
dev = { file = ["binary.csv"], text = "text", label = "is_health" }
epochs = 10
lr = 1e-3

[[system]]
name = "FT"
[[system]]
name = "Full-Debias"
method = "full"
upstream = { lr = 1e-4 }
[[system]]
name = "LoRA"
method = "lora"
set = { rank = 2 }

[[column]]
stage = "upstream"
title = "CrowS"
measure = "crows-pairs/bias-bench/all"
paper = { BERT = 57.25, LoRA = 54 }
[[column]]
stage = "downstream"
title = "TPR-GAP"
measure = "tpr-gap/rms"
paper = { FT = 13.05 }
[[column]]
stage = "transfer"
title = "accuracy"
measure = "accuracy"
'''


@pytest.fixture
def place(small, tmp_path):
    """(recipe file, data folder): texts of the splits differ, so that a split is never empty."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev", "test", "pairs"):
        source = getattr(small, name)
        (data / (source.name if name == "pairs" else f"{name}.jsonl")).write_bytes(source.read_bytes())
    header, *rows = small.binary.read_text().splitlines(keepends=True)
    for folder, part in (("a", rows[:50]), ("b", rows[50:70]), ("c", rows[70:])):
        (data / folder).mkdir()
        (data / folder / "binary.csv").write_text(header + "".join(part))
    text = RECIPE.replace("PAIRS", small.pairs.name)
    for folder in "acb":
        text = text.replace('"binary.csv"', f'"{folder}/binary.csv"', 1)
    file = tmp_path / "small.toml"
    file.write_text(text)
    return file, data
