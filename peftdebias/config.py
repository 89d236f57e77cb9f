"""What can be set, in one place: a frozen dataclass per command; its fields are the flags of the command line and the keys of a TOML file.

Order of force: a flag, else the TOML file, else the default here. Unknown keys raise. All of it is printed and saved with the run, what is None left out (a default
that depends on another flag, batch_size say); the saved config.toml can be given as --config again.
"""

import math

from .errors import ConfigError
from .options import SEEDS, at_least, at_most, check_seed, flag, option, settings

THREADS = 1024  # few enough that what each needs fits in memory
LEAST = 3  # tokens of a text: the special ones and one more
UNITS = ("line", "sentence", "document")  # what a text is in a file
ON_ERROR = ("stop", "skip")  # what a corrupt line does
OCCURRENCES = ("all", "one")  # which attribute words a counterfactual replaces
KEEP = ("pairs", "originals", "counterfactuals")
METRICS = ("accuracy", "f1", "macro-f1")  # what chooses the best epoch
ANSWERED_IN = ("float32", "bf16")  # precisions of answers, as `load` takes them too
LEAST_SAMPLES = 40  # of a bootstrap: below, an interval's ends, 2.5 % of the samples, are no sample's


@settings
class Swapping:
    """How texts become counterfactuals; cda.Intervention says what each choice does."""

    axis: str = option("axis of bias: a shipped name (gender, race, ...) or a TOML file of yours", metavar="NAME|FILE")
    from_: str | None = option("one-sided: replace words of this column of the axis alone (female, say, or its number)", None, metavar="COLUMN")
    occurrences: str = option("a counterfactual replaces all attribute words, or one of them, so that a text gets one for each", "all", choices=OCCURRENCES)
    max_variants: int | None = option("at most that many counterfactuals of a text, chosen by its hash", None)
    keep: str = option("texts with their counterfactuals, or either alone", "pairs", choices=KEEP)
    names: str | None = option("swap first names too: without FILE (or by the word shipped, where another word follows) by the shipped table (US, axis gender), else by yours", None, many="maybe", metavar="FILE")

    def __post_init__(self):
        at_least(1, self, "max_variants")


@settings
class Training:
    """What both phases share."""

    seed: int = option("every random choice follows from it: same seed, machine and number of threads, same bits", 0)
    batch_size: int | None = option("texts in a batch (default 32 unless --batch-tokens is given)", None)
    batch_tokens: int | None = option("tokens in a batch, instead of --batch-size", None, instead="batch_size")
    max_length: int = option("longest text in tokens; longer ones are cut, counted and reported", 256)
    weight_decay: float = option("decoupled weight decay of matrices (AdamW)", 0.0)
    warmup: float = option("share of all steps in which the learning rate rises; it falls linearly afterwards", 0.1)
    clip: float = option("largest gradient norm", 1.0)
    device: str = option("cpu, cuda, cuda:1, ...; auto takes a GPU where there is one", "auto")
    precision: str = option("float32 or bf16 (on a GPU autocast, on a CPU with AVX-512 BF16 or AMX wide products alone); auto is bf16 on a GPU that multiplies it", "auto",
                            choices=("auto", "float32", "bf16"))
    step: str = option("how a step runs: eager, graph (replayed as a CUDA graph) or compiled (torch.compile); auto is graph on a GPU", "auto",
                       choices=("auto", "eager", "graph", "compiled"))
    save_memory: bool = option("keep the inputs of the layers alone and compute the rest again in the backward: the same bits, less memory, more time", False)
    overwrite: bool = option("replace --out if it exists", False)
    force: bool = option("attach modules that were made for another base, where shapes allow it", False)

    def __post_init__(self):
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ConfigError("--batch-size and --batch-tokens: expected one of them, got both")
        at_least(1, self, "batch_size", "batch_tokens")
        at_least(LEAST, self, "max_length")
        check_seed(self.seed)
        at_least(0, self, "weight_decay")
        for name in ("lr", "weight_decay"):
            if math.isinf(getattr(self, name)):
                raise ConfigError(f"{flag(name)}: expected a finite number, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{flag(name)}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"--warmup: expected a share from 0 to 1, got {self.warmup}")

    @property
    def batch(self) -> dict:
        """batch_size or batch_tokens as batches.plan takes them."""
        if self.batch_tokens is not None:
            return {"batch_tokens": self.batch_tokens}
        return {"batch_size": self.batch_size or 32}


@settings
class Upstream(Swapping, Training):
    """Learn to undo one axis of bias: the base is frozen, a small module is trained by masked-LM on counterfactual text."""

    model: str = option("Hugging Face model folder, run folder, or name in the local cache", metavar="DIR")
    corpus: tuple[str, ...] = option("text files or quoted patterns such as 'texts/*.txt.gz': txt, csv, tsv, jsonl, each also .gz", many="words", metavar="FILE")
    out: str = option("run folder to write", metavar="RUN")
    method: str = option("what is trained, a name that `peftdebias methods` lists; one that trains the base itself makes a base", "lora")
    column: str | None = option("column with the text, in csv, tsv and jsonl, or its number from 0 in a table without a header (default: text)", None, metavar="COL")
    unit: str = option("what a text is: a line or row, each of its sentences, or (txt) the lines up to a blank one", "line", choices=UNITS)
    on_error: str = option("a corrupt line or record (no utf-8, no JSON, another number of fields, no text) stops the run, or is left out and counted", "stop", choices=ON_ERROR)
    shuffle_buffer: int = option("texts with their counterfactuals that are shuffled together, in the order of the files; a corpus of no more is shuffled whole", 131072)
    workers: int | None = option("0: batches are made between the steps; N: by a background process with N threads (default: 0 for less than 8 MiB of files, else up to 2)", None)
    cache: str | None = option("folder that keeps the tokenised texts; the next run on the same texts, axis and tokenizer reads them from there", None, metavar="DIR")
    valid: tuple[str, ...] = option("text files to validate on (default: a share of the corpus)", (), many="words", metavar="FILE")
    valid_share: float = option("share of the corpus held out for validation, chosen by hash; a text and its counterfactuals stay together", 0.02)
    valid_texts: int = option("at most that many held-out texts with their counterfactuals", 500)
    valid_every: int = option("steps between validations; the module with the lowest loss is kept", 1000)
    budget: float | None = option("size of the module as a share of the base's parameters, e.g. 0.01", None)
    set: dict | None = option("option of the method, e.g. --set rank=8 --set targets=query,key,value", None, many="repeat", metavar="KEY=VALUE", under="method")
    adapter: tuple[str, ...] = option("frozen modules to attach first, each a run or adapter folder", (), many="repeat", metavar="RUN")
    fresh_head: int | None = option("for a base without a masked-LM head: first train a new tied one for N steps, encoder frozen; saved with the run", None)
    attribute_weight: float = option("how many times likelier than another a word of the axis is chosen for masking, among words that are one token; 1 is BERT's masking", 1.0)
    steps: int = option("training steps", 10000)
    lr: float = option("peak learning rate", 5e-5)

    def __post_init__(self):
        Swapping.__post_init__(self)
        Training.__post_init__(self)
        at_least(1, self, "steps", "valid_every", "valid_texts", "fresh_head", "shuffle_buffer")
        at_least(0, self, "workers")
        at_most(THREADS, self, "workers")
        if not self.corpus:
            raise ConfigError("--corpus: expected at least one file, got none")
        _read_once("--corpus and --valid", *self.corpus, *self.valid)
        if not 0 < self.valid_share < 1:
            raise ConfigError(f"--valid-share: expected a share between 0 and 1, got {self.valid_share}")
        check_weight(self)


@settings
class Downstream(Training):
    """Train a classifier on a labelled file: attached modules are frozen, the base and a new head learn the task."""

    model: str = option("Hugging Face model folder, run folder, or name in the local cache", metavar="DIR")
    train: str = option("labelled csv, tsv or jsonl file to train on", metavar="FILE")
    dev: str = option("labelled file to choose the best epoch on", metavar="FILE")
    text: str = option("column with the text", metavar="COL")
    label: str = option("column with the label; several, as a,b, mean: 1 if any of them is 1", metavar="COL")
    out: str = option("run folder to write", metavar="RUN")
    test: str | None = option("labelled file to report on at the end", None, metavar="FILE")
    adapter: tuple[str, ...] = option("debiasing module to attach and freeze, a run or adapter folder; may be given several times", (), many="repeat", metavar="RUN")
    text_pair: str | None = option("column with the second text, for pair tasks", None, metavar="COL")
    group: str | None = option("column with the protected group of each text's subject (m/f, say), for TPR-GAP", None, metavar="COL")
    class_weights: str | None = option("weights of the labels in the loss, e.g. 0=1,1=10 (default 1 each)", None, metavar="A=W,...")
    metric: str = option("what chooses the best epoch", "accuracy", choices=METRICS)
    positive: str | None = option("the label that F1 is of (default: 1, 1.0, true or yes of two labels)", None, metavar="LABEL")
    epochs: int = option("passes over the training file", 10)
    lr: float = option("peak learning rate", 2e-5)
    fold: bool = option("train W + delta in place of W where a frozen module allows it: the same training, faster", True)

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "epochs")
        columns = [self.text, *([self.text_pair] if self.text_pair else []), *self.label.split(",")]
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise ConfigError(f"--text, --text-pair, --label: expected columns of their own, got {twice} twice")


@settings
class Evaluate:
    """Measure bias and quality of a model or run. Each --on NAME=FILE adds measures."""

    model: str = option("model folder, run folder, or name in the local cache", metavar="DIR_OR_RUN", positional=True)
    on: tuple[str, ...] = option("what to measure and the file to measure it on; may be given several times", (), many="repeat", metavar="NAME=FILE")
    adapter: tuple[str, ...] = option("module to attach, a run or adapter folder; may be given several times", (), many="repeat", metavar="RUN")
    bias_type: str | None = option("only this category (gender, race-color, ...; default: all, and each)", None, of=("crows-pairs",))
    sentence_vector: str = option("a text's vector: the first token's of the last layer (May et al.), or the mean over its tokens (bias-bench)", "first",
                                  choices=("first", "mean"), of=("seat",))
    text: str | None = option("column with the text (default: the run's own; for perplexity: text)", None, metavar="COL", of=("classification", "fprd", "counterfactual", "perplexity"))
    text_pair: str | None = option("column with the second text (default: the run's own)", None, metavar="COL", of=("classification", "fprd", "counterfactual"))
    label: str | None = option("column with the label (default: the run's own)", None, metavar="COL", of=("classification", "fprd"))
    group: str | None = option("column with the protected group (default: the run's own)", None, metavar="COL", of=("classification",))
    positive: str | None = option("the label that F1 and FPRD are of (default: the run's own)", None, metavar="LABEL", of=("classification", "fprd", "iptts"))
    terms: str | None = option("file with the identity terms, one a line (default for iptts: identity.csv beside it)", None, metavar="FILE", of=("fprd", "iptts"))
    neutral: str | None = option("the label that means neutral (default: neutral; of the labels 0, 1, 2: 1)", None, metavar="LABEL", of=("bias-nli",))
    axis: str | None = option("axis whose words are swapped, a shipped name or a TOML file of yours (default: the shipped one that the run's module was learnt on)", None,
                              metavar="NAME|FILE", of=("counterfactual",))
    max_pairs: int = option("at most that many pairs, a sample chosen by the seed; 0: all", 20000, of=("bias-nli",))
    max_length: int | None = option("longest text in tokens; longer ones are cut, counted and reported (default: the run's own, else 256)", None,
                                    of=("perplexity", "classification", "fprd", "iptts", "bias-nli", "counterfactual"))
    batch_tokens: int = option("tokens in a batch; on a CPU it is cut to what stays in the cache", 8192)
    samples: int = option("bootstrap samples for the intervals", 1000)
    seed: int = option("of all that is drawn: the bootstrap, perplexity's masks, seat's permutations, bias-nli's sample, what chance alone gives", 0)
    device: str = option("cpu, cuda, ...; auto takes a GPU where there is one", "auto")
    force: bool = option("attach modules that were made for another base, where shapes allow it", False)
    json: str | None = option("write the measures there", None, metavar="FILE")
    examples: str | None = option("write the scores of every example there, as jsonl", None, metavar="FILE")

    def __post_init__(self):
        at_least(1, self, "batch_tokens")
        at_least(LEAST_SAMPLES, self, "samples")
        at_least(LEAST, self, "max_length")
        at_least(0, self, "max_pairs")
        check_seed(self.seed)


@settings
class Compare:
    """Compare two systems, never without an interval: `evaluate --examples` files of both on the same examples (paired bootstrap, McNemar), or with --seeds
    `evaluate --json` files of one system under several seeds (mean and spread), --against those of another."""

    files: tuple[str, ...] = option("two --examples files; with --seeds, the --json files of one system", (), many="words", metavar="FILE", positional=True)
    seeds: bool = option("the files are --json files, one a seed", False)
    against: tuple[str, ...] = option("--seeds: the --json files of another system, the same seeds in the same order", (), many="words", metavar="FILE")
    samples: int = option("bootstrap samples for the intervals (--seeds needs none)", 1000)
    seed: int = option("of the bootstrap (--seeds needs none)", 0)
    json: str | None = option("write the comparison there", None, metavar="FILE")

    def __post_init__(self):
        at_least(LEAST_SAMPLES, self, "samples")
        check_seed(self.seed)


@settings
class Run:
    """Do a whole recipe: all systems, seeds, both phases, transfer and measures, ending in the paper's table; taken up again where it was stopped."""

    recipe: str = option("recipe file, or the name of a shipped one (biasbios, bug, ghc, lhc, mnli)", metavar="RECIPE", positional=True)
    model: str = option("base: Hugging Face model folder, or name in the local cache", metavar="DIR")
    data: str = option("folder with the public data sets, as they are downloaded; files are looked for in it and below", metavar="DIR")
    out: str = option("folder to write; a stopped run goes on there", metavar="DIR")
    scale: float = option("share of the paper's schedule: upstream steps, and downstream epochs (below one epoch, that share of the training file)", 1.0)
    seeds: int | None = option("how many seeds, 0 to N-1 (default: the recipe's)", None)
    systems: tuple[str, ...] = option("only these systems (default: all of the recipe)", (), many="words", metavar="NAME")
    upstream: tuple[str, ...] = option("setting of the upstream phase, for all systems or one: --upstream lr=1e-3 --upstream Full-Debias.lr=5e-5", (), many="repeat",
                                       metavar="[SYSTEM.]KEY=VALUE")
    downstream: tuple[str, ...] = option("the same of the downstream phase; one task's too: --downstream sick.epochs=10", (), many="repeat", metavar="[NAME.]KEY=VALUE")
    device: str = option("cpu, cuda, ...; auto takes a GPU where there is one", "auto")

    def __post_init__(self):
        at_least(1, self, "seeds")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"--scale: expected a finite number above 0, got {self.scale}")


@settings
class Predict:
    """Label texts with a downstream run: label and probabilities, one JSON object a line."""

    run: str = option("run folder of `downstream`", metavar="RUN", positional=True)
    file: str | None = option("csv, tsv, jsonl or txt file (default: one text a line on standard input)", None, metavar="FILE", positional=True)
    text: str | None = option("column with the text (default: the run's own); a txt file, one text a line otherwise, is then a table with tabs", None, metavar="COL")
    text_pair: str | None = option("column with the second text (default: the run's own)", None, metavar="COL")
    out: str | None = option("file to write (default: standard output)", None, metavar="FILE")
    max_length: int | None = option("longest text in tokens; longer ones are cut, counted and reported (default: the run's own, else 256)", None)
    batch_tokens: int = option("tokens in a batch; on a CPU it is cut to what stays in the cache", 8192)
    device: str = option("cpu, cuda, ...; auto takes a GPU where there is one", "auto")
    precision: str = option("float32, or bf16, faster on a GPU and on a CPU with AVX-512 BF16 or AMX; probabilities then differ in their third digit", "float32", choices=ANSWERED_IN)

    def __post_init__(self):
        at_least(1, self, "batch_tokens")
        at_least(LEAST, self, "max_length")


@settings
class Augment(Swapping):
    """Write counterfactuals of texts: what each text says when the attribute words of an axis are swapped, one JSON object a line."""

    files: tuple[str, ...] = option("txt, csv, tsv or jsonl files, each also .gz, or quoted patterns (default: one text a line on standard input)", (), many="words",
                                    metavar="FILE", positional=True)
    column: str | None = option("column with the text, in csv, tsv and jsonl, or its number from 0 in a table without a header (default: text)", None, metavar="COL")
    unit: str = option("what a text is: a line or row, each of its sentences, or (txt) the lines up to a blank one", "line", choices=UNITS)
    on_error: str = option("a corrupt line or record stops the command, or is left out and counted", "stop", choices=ON_ERROR)
    out: str | None = option("file to write (default: standard output)", None, metavar="FILE")
    format: str = option("jsonl: a row a counterfactual, with text, counterfactual, swaps and source; lines: the texts and counterfactuals alone, one a line", "jsonl",
                         choices=("jsonl", "lines"))
    stats: str | None = option("write what was found and done there, as JSON", None, metavar="FILE")
    shard: str | None = option("i/n: only the i-th of n equal stretches of the texts; the outputs of 1/n to n/n end to end are that of the whole", None, metavar="I/N")
    threads: int = option("threads of the engine", 1)

    def __post_init__(self):
        super().__post_init__()
        _read_once("FILE", *self.files)
        at_least(1, self, "threads")
        at_most(THREADS, self, "threads")
        if self.shard is not None:
            first, slash, last = self.shard.partition("/")
            if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
                raise ConfigError(f"--shard: expected I/N with I from 1 to N, got {self.shard!r}")

    @property
    def shard_of(self) -> tuple[int, int]:
        """(i, n) of --shard."""
        shard, _, shards = self.shard.partition("/")
        return int(shard), int(shards)


@settings
class Methods:
    """List the methods, each at the size that --budget chooses for a model: parameters, share of the base, file size, what merges and folds."""

    model: str = option("Hugging Face model folder, run folder, or name in the local cache", metavar="DIR")
    budget: float = option("size of a module as a share of the base's parameters", 0.01)
    max_length: int = option("longest text in tokens, for which a prompt leaves room", 256)

    def __post_init__(self):
        at_least(LEAST, self, "max_length")


@settings
class Doctor:
    """Say what runs here: versions, device, and for every op which implementation would be used and why."""

    device: str = option("cpu, cuda, cuda:1, ...; auto takes a GPU where there is one", "auto")


@settings
class Export:
    """Write a run for other libraries, with a card: as a plain Hugging Face model folder, a `peft` adapter folder, or a model with the module in its weights."""

    run: str = option("run folder of `upstream`, `downstream` or `import`", metavar="RUN", positional=True)
    as_: str = option("hf: the model of a run without a module; peft: a run's module; merged: the model with its module in the weights", metavar="FORM", choices=("hf", "peft", "merged"))
    out: str = option("folder to write", metavar="DIR")
    overwrite: bool = option("replace --out if it is an exported folder", False)


@settings
class Import:
    """Read a module of another library, a Hugging Face `peft` or AdapterHub folder, and write it as a run folder bound to its base."""

    folder: str = option("adapter folder of theirs, with adapter_config.json", metavar="DIR", positional=True)
    model: str = option("the base it belongs to: Hugging Face model folder, or name in the local cache", metavar="DIR")
    axis: str = option("axis of bias that the module was learnt on; its name when attached", metavar="NAME")
    out: str = option("run folder to write", metavar="RUN")
    overwrite: bool = option("replace --out if it exists", False)


@settings
class Demo:
    """The whole method on a small made-up world, in a minute or two: pretrain a tiny BERT, debias it, classify, measure."""

    out: str = option("folder to write; an earlier demo there is replaced", "runs/demo", metavar="DIR")
    strength: float = option("how strongly occupations are linked to a gender in the pretraining text, from 0 to 1", 0.8)
    label_strength: float = option("how strongly they are linked in the labelled task, from 0 to 1", 0.5)
    seed: int = option("every random choice follows from it", 0)

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("strength", "label_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag(name)}: expected a strength from 0 to 1, got {getattr(self, name)}")


@settings
class Report:
    """Show runs and results in one self-contained HTML file. Their figures lie beside it, as metrics.json."""

    paths: tuple[str, ...] = option("run folders, which are shown together, result folders of recipes, and testbeds", many="words", metavar="PATH", positional=True)
    out: str = option("HTML file to write, its name in .html", "report.html", metavar="FILE")
    examples: int = option("at most that many texts whose label flips, of each system; they may be offensive when the data is", 20)

    def __post_init__(self):
        at_least(0, self, "examples")


@settings
class Testbed:
    """Does it debias? Plant a link between occupation and gender of known strength in a made-up world's pretraining text or task labels, measure it before and
    after each method over several seeds, and write the figures, a table and a drawing. Stopped, it goes on where it was."""

    out: str = option("folder to write; an earlier run of the same scale there is continued", "runs/testbed", metavar="DIR")
    text_strengths: tuple[str, ...] = option("strengths planted in the pretraining text, from 0 to 1; the classifiers start from the bases of the last", ("0.4", "0.8"),
                                             many="words", metavar="X")
    label_strengths: tuple[str, ...] = option("strengths planted in the labelled task", ("0", "0.2", "0.4", "0.6", "0.8", "1"), many="words", metavar="X")
    method_strengths: tuple[str, ...] = option("those of both at which the methods are run, not the base and plain fine-tuning alone (default: all); "
                                               "the last of the text always is one", (), many="words", metavar="X")
    methods: tuple[str, ...] = option("methods to run beside the base and plain fine-tuning (default: all; none: those two alone)", (), many="words", metavar="NAME")
    seeds: tuple[str, ...] = option("seeds of worlds and training", ("0", "1", "2", "3", "4"), many="words", metavar="N")
    scale: float = option("multiplies texts, examples, pairs and steps; 0.05 is a quick look that learns nothing", 1.0)
    upstream_steps: int | None = option("steps in which a method learns upstream (default: 1200 times --scale)", None)
    attribute_weight: float = option("as of upstream: how many times likelier than another a gendered word is chosen for masking", 10.0)
    jobs: int = option("processes at a time, each on one thread", 1)

    def __post_init__(self):
        at_least(1, self, "jobs", "upstream_steps")
        check_weight(self)
        if not 0 < self.scale <= 100:
            raise ConfigError(f"--scale: expected more than 0, up to 100, got {self.scale}")
        for name, kind in (("text_strengths", float), ("label_strengths", float), ("method_strengths", float), ("seeds", int)):
            values = [_number(kind, text) for text in getattr(self, name)]
            what = "strengths from 0 to 1" if kind is float else "whole numbers from 0"
            right = all(v is not None and 0 <= v <= (1 if kind is float else SEEDS) for v in values) and len(set(values)) == len(values)
            if not right or (not values and name != "method_strengths"):
                raise ConfigError(f"{flag(name)}: expected {what}, each once, got {' '.join(getattr(self, name)) or 'none'}")
        if odd := set(self.numbers("method_strengths")) - {*self.numbers("text_strengths"), *self.numbers("label_strengths")}:
            raise ConfigError(f"--method-strengths: expected some of --text-strengths and --label-strengths, got {' '.join(f'{x:g}' for x in sorted(odd))}")

    def numbers(self, name: str) -> tuple:
        """A field of numbers as numbers: strengths as float, seeds as int."""
        return tuple((int if name == "seeds" else float)(text) for text in getattr(self, name))


MEASURES = {
    "crows-pairs": "CrowS-Pairs csv: share of pairs in which the stereotype is preferred (ideal 50 %), both scorings, over all and by category",
    "stereoset": "StereoSet json, its intrasentence contexts: LM score (ideal 100 %), SS score (ideal 50 %) and ICAT (ideal 100), overall and by domain",
    "seat": "SEAT or WEAT file (jsonl), or a folder of them: effect size (ideal 0) and permutation p of each; any encoder",
    "perplexity": "text file: masked-LM loss (nats) and perplexity, the cost of debiasing",
    "classification": "labelled file, for a downstream run: accuracy, F1 and, with --group, TPR-GAP per class and rms, equalised odds, demographic parity",
    "fprd": "labelled file, for a downstream run: false positive rate differences over the identity terms of --terms",
    "iptts": "identity phrase templates (csv with Text and bin_label), for a downstream run: the same on them",
    "bias-nli": "folder of word lists, for a run on inference pairs: net neutral, fraction neutral, thresholds (ideal 1)",
    "counterfactual": "file with texts, for a downstream run: share whose label changes when the words of --axis are swapped, and by how much (ideal 0)",
}
"""The names of `evaluate --on NAME=FILE`, with help; evaluation.ON computes them."""


def _read_once(what: str, *files: str) -> None:
    if (times := files.count("-")) > 1:
        raise ConfigError(f"{what}: expected standard input, -, once, since it is read once; got it {times} times")


def check_weight(settings, called: str = "--attribute-weight") -> None:
    """Raises ConfigError on an `attribute_weight` that no word can have. called: what the message calls it."""
    if not 1 <= settings.attribute_weight <= 1000:
        raise ConfigError(f"{called}: expected a number from 1 to 1000, got {settings.attribute_weight}")


def _number(kind: type, text: str):
    """`text` as `kind`, or None."""
    try:
        return kind(text)
    except ValueError:
        return None
