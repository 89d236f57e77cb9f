"""How fast CrowS-Pairs is scored: python bench/crows.py ../shared/data/crows_pairs/crows_pairs_anonymized.csv ../shared/models/bert-tiny-mlm

First that the packed answers are the slow way's, one forward pass a question with the scores of every token at every place (questions.masked_log_probs_ref), on
a sample: to 1e-6 in float64, and in float32 no further from those than twice the slow way is, + 1e-6; no time is taken where they are not. Then, on one thread and on --pairs pairs
spread over the file, both scorings: ours, the slow way (on --slow questions of them, spread too), and the best matrix product, in turns. Then, on the given
model, the whole file from tokenising to figures. Two models: the given one, and one of 6 layers, width 384, with its tokenizer and random weights.

    times_slow   seconds a question of the slow way over ours
    times_floor  our seconds over the floor: the FLOPs that the distinct questions need (last layer and head on the asked rows alone) at the best rate that any
                 matrix product of SHAPES reached in this run

Medians over --repeats; `cpu` is by the processor's time of this process, `wall` by the clock, which on a busy machine measures the neighbours too.
Prints one JSON object a line, with machine, load and commit.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402

from bench import rows  # noqa: E402
from bench.arguments import Parser, complain, existing_file, existing_folder, positive  # noqa: E402
from peftdebias import questions, weights  # noqa: E402
from peftdebias.encoder import EncoderConfig, Model  # noqa: E402
from peftdebias.errors import PeftDebiasError  # noqa: E402
from peftdebias.kernels import dispatch  # noqa: E402
from peftdebias.metrics import crows_pairs  # noqa: E402
from peftdebias.ops import linear  # noqa: E402

SHAPES = ((1024, 1024, 1024), (2048, 384, 1536), (512, 384, 1536), (2048, 128, 512), (512, 128, 512), (64, 128, 30522), (64, 384, 30522))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def flops(config: EncoderConfig, asked) -> float:
    """FLOPs of all matrix products that the distinct contexts of `asked` need: layers but the last on every token, of the last keys and values alone."""
    contexts = {(numpy.asarray(q.ids).tobytes(), q.place): len(q.ids) for q in asked}
    d, f, n = config.hidden, config.feed_forward, numpy.array([*contexts.values()], float)
    layer = 8 * d * d + 4 * d * f  # of a token: Q, K, V, output; up and down
    every = (config.layers - 1) * (n * layer + 4 * n * n * d)
    last = n * 4 * d * d + layer - 4 * d * d + 4 * n * d
    return float((every + last + 2 * d * d + 2 * d * config.vocab).sum())


def timed(function) -> dict[str, float]:
    begin = {name: clock() for name, clock in CLOCKS.items()}
    function()
    return {name: clock() - begin[name] for name, clock in CLOCKS.items()}


def rates() -> dict[str, float]:
    """The best FLOP/s of one product, over SHAPES, both libraries that ops.linear picks from, and a few tries each."""
    best = dict.fromkeys(CLOCKS, 0.0)
    for m, k, n in SHAPES:
        a, b, times = torch.randn(m, k), torch.randn(n, k), max(1, int(1e9 / (2 * m * k * n)))
        for form in 3 * dispatch.FORMS["linear"]:
            with dispatch.use("linear", form):
                taken = timed(lambda: [linear(a, b) for _ in range(times)])
            best = {name: max(best[name], 2 * m * k * n * times / taken[name]) for name in CLOCKS}
    return best


def check(model: Model, asked) -> None:
    """Leaves with a line where the packed answers are not the slow way's: in float64 to 1e-6, in float32 to twice the slow way's own distance from those + 1e-6."""
    slow, ours = questions.masked_log_probs_ref(model, asked), questions.masked_log_probs(model, asked)
    double = model.double()
    exact, packed = questions.masked_log_probs_ref(double, asked), questions.masked_log_probs(double, asked)
    model.float()
    apart = {"float64": packed - exact, "float32": ours - exact, "slow_float32": slow - exact, "float32_from_slow": ours - slow}
    apart = {name: float(numpy.abs(difference).max()) for name, difference in apart.items()}
    if not (apart["float64"] <= 1e-6 and apart["float32"] <= 2 * apart["slow_float32"] + 1e-6):
        sys.exit(f"bench/crows.py: the packed answers are not the slow way's, nothing is timed: {apart}")
    show("equality", questions=len(asked), largest_difference=apart)


def show(what: str, **more) -> None:
    print(json.dumps({"what": what, **more, "threads": torch.get_num_threads(), "torch": torch.__version__, **rows.machine()}), flush=True)


@torch.no_grad()
def compare(name: str, model: Model, tokenizer, pairs, a) -> None:
    encoded = crows_pairs.encode_pairs(tokenizer, pairs, model.config.max_positions)
    asked, _ = crows_pairs.questions(pairs, encoded, tokenizer.mask_id)
    some = asked[::max(1, len(asked) // a.slow)][:a.slow]
    check(model, some)
    sides = {"ours": lambda: questions.masked_log_probs(model, asked), "slow": lambda: questions.masked_log_probs_ref(model, some)}
    taken: dict[str, list[dict]] = {side: [] for side in sides}
    best = dict.fromkeys(CLOCKS, 0.0)
    for repeat in range(a.repeats):
        for side in [*sides][:: 1 if repeat % 2 else -1]:
            best = {clock: max(best[clock], rate) for clock, rate in rates().items()}
            taken[side].append(timed(sides[side]))
    floor = {clock: flops(model.config, asked) / best[clock] for clock in CLOCKS}
    middle = {side: {clock: statistics.median(one[clock] for one in taken[side]) for clock in CLOCKS} for side in sides}
    show("crows-pairs, both scorings", model=name, pairs=len(pairs), questions=len(asked), slow_questions=len(some), repeats=a.repeats, gflop=round(flops(model.config, asked) / 1e9, 1),
         best_gflops={clock: round(rate / 1e9, 1) for clock, rate in best.items()},
         seconds={side: {clock: [round(one[clock], 3) for one in taken[side]] for clock in CLOCKS} for side in sides},
         ms_a_question={side: {clock: round(1e3 * middle[side][clock] / count, 3) for clock in CLOCKS} for side, count in (("ours", len(asked)), ("slow", len(some)))},
         times_slow={clock: round(middle["slow"][clock] / len(some) / (middle["ours"][clock] / len(asked)), 2) for clock in CLOCKS},
         times_floor={clock: round(middle["ours"][clock] / floor[clock], 2) for clock in CLOCKS})


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=existing_file)
    parser.add_argument("model", type=existing_folder)
    parser.add_argument("--pairs", type=positive, default=50)
    parser.add_argument("--slow", type=positive, default=200)
    parser.add_argument("--repeats", type=positive, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    try:
        loaded, every = weights.load(a.model, mlm=True, labels=()), crows_pairs.read_pairs(a.file)
    except PeftDebiasError as error:
        sys.exit(complain(str(error)))
    pairs = every[::max(1, len(every) // a.pairs)][:a.pairs]
    six = Model(EncoderConfig(kind="bert", layers=6, hidden=384, heads=12, feed_forward=1536, vocab=loaded.model.config.vocab, max_positions=512), mlm=True)
    six.initialize(six, torch.Generator().manual_seed(0))
    compare(a.model.name, loaded.model.eval(), loaded.tokenizer, pairs, a)
    compare("6 layers x 384, random", six.eval(), loaded.tokenizer, pairs, a)

    def whole() -> None:
        encoded = crows_pairs.encode_pairs(loaded.tokenizer, every, loaded.model.config.max_positions)
        for scoring, scored in crows_pairs.score_encoded(loaded.model, every, encoded, loaded.tokenizer.mask_id).items():
            crows_pairs.measures(scored, scoring)

    taken = [timed(whole) for _ in range(3)]
    show("the whole file, both scorings, all categories", model=a.model.name, pairs=len(every), seconds={clock: [round(one[clock], 1) for one in taken] for clock in CLOCKS})


if __name__ == "__main__":
    main()
