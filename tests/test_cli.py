"""The command line, run as a user runs it; models are tiny ones made here unless a test says bundled."""

import errno
import io
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from folders import write_folder
from rich.console import Console
from rich.control import strip_control_codes
from test_layouts_llama import SIZES, state_of

import unmask
from unmask import checkpoints, cli, measure, request
from unmask.calibration import Calibration
from unmask.models.dit import Shape, tensor_shapes
from unmask.progress import Bar, Lines, Progress, Unmasking
from unmask.sampler import Sampler
from unmask.study.prices import Prices
from unmask.training import corpus

LLAMA = SIZES | {"model_type": "llama", "torch_dtype": "float32"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for number in range(4):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(["peace", "union", "war"]) for _ in range(200)))
    return folder


@pytest.fixture(scope="module")
def pair(texts, tmp_path_factory):
    """Folders of two random models that share a tokenizer."""
    tokenizer = corpus.train_tokenizer(corpus.read_documents(texts), 264)
    folders = []
    for seed, blocks in enumerate((2, 1)):
        generator = torch.Generator().manual_seed(seed)
        config = {
            "vocab_size": 264,
            "mask_id": 263,
            "hidden_dim": 16,
            "n_blocks": blocks,
            "n_heads": 2,
            "mlp_dim": 64,
            "model_length": 32,
            "tie_word_embeddings": True,
        }
        shapes = tensor_shapes(Shape(264, 16, blocks, 64, tied=True))
        tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        folder = tmp_path_factory.mktemp("models") / ("heavy", "light")[seed]
        folders.append(str(checkpoints.save(folder, config, tensors, tokenizer=tokenizer)))
    return folders


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `unmask ARGUMENTS` and gives (exit status, standard output, standard error); measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rates = {
        "Product": dict.fromkeys(("call", "weight", "output", "gelu", "flop"), 1e-9),
        "Attention": dict.fromkeys(("call", "sequence", "query", "key", "score", "flop"), 1e-9),
        "AddNorm": dict.fromkeys(("call", "element"), 1e-9),
        "SwiGLU": dict.fromkeys(("call", "element"), 1e-9),
        "Draw": dict.fromkeys(("call", "weight", "logit", "flop"), 1e-9),
    }
    monkeypatch.setattr(
        measure, "measure", lambda device, dtype, tell: Calibration(measure.describe(device, dtype), rates, 0.5)
    )

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return command


def models(pair):
    return "-m", f"heavy={pair[0]}", "-m", f"light={pair[1]}", "--schedule", "light:25% heavy:50% light:25%"


class TestSample:
    def test_prints_every_text_and_keeps_progress_apart(self, run, pair):
        status, out, err = run("sample", "-n", 3, "--length", 16, "--reveal", "ancestral:8", *models(pair))
        assert status == 0
        assert [line for line in out.splitlines() if line.startswith("---")] == [f"--- {i} ---" for i in range(3)]
        assert "sampling: 100%, 48 of 48 tokens, 3 of 3 sequences" in err
        assert "of block FLOPs saved" in err and "saved" not in out

    def test_json_is_one_object_with_everything(self, run, pair):
        status, out, _ = run("sample", "-n", 2, "--length", 8, "--seed", 7, "--json", *models(pair))
        found = json.loads(out)
        assert status == 0 and out.count("\n") == 1
        assert found.keys() == {"seed", "tokens", "texts", "reveal_step", "logprobs", "stats"}
        assert found["seed"] == 7 and len(found["texts"]) == 2 and len(found["tokens"][1]) == 8
        stats = found["stats"]
        assert stats.keys() >= {"nfe", "events", "ticks", "occupancy", "flops", "seconds", "peak_bytes"}
        assert stats["nfe"].keys() == stats["flops"].keys() == {"heavy", "light"}
        by_model = stats["seconds"].pop("models")
        assert stats["seconds"].keys() == {"total", "plan", "body", "head", "other"}
        assert min(stats["seconds"].values()) >= 0 and stats["seconds"]["body"] > 0
        for phase in ("body", "head"):
            assert sum(phases[phase] for phases in by_model.values()) == pytest.approx(stats["seconds"][phase])

    def test_agrees_with_the_library(self, run, pair):
        _, out, _ = run("sample", "-n", 2, "--length", 8, "--seed", 3, "--json", "-m", pair[0], "--reveal", "fixed:4")
        sampler = unmask.Sampler(unmask.load(pair[0]), reveal=unmask.Fixed(4))
        assert json.loads(out)["tokens"] == sampler.sample(2, 8, seed=3).tokens.tolist()

    @pytest.mark.parametrize("choice", [torch.float32, torch.bfloat16])
    def test_auto_chooses_one_dtype_for_all_and_says_so(self, run, pair, monkeypatch, choice):
        other = torch.bfloat16 if choice is torch.float32 else torch.float32
        monkeypatch.setattr("unmask.dtype.in_turns", lambda runs, **options: {choice: [0.003], other: [0.004]})
        made = []
        monkeypatch.setattr(
            request, "Sampler", lambda models, **options: made.append(models) or Sampler(models, **options)
        )
        status, _, err = run("sample", "-n", 1, "--length", 8, "--dtype", "auto", *models(pair))
        names = [str(dtype).removeprefix("torch.") for dtype in (choice, other)]
        assert status == 0 and err.startswith(f"dtype {names[0]}: a block takes 3 ms, 4 ms in {names[1]}\n")
        assert {model.dtype for model in made[0].values()} == {choice}

    def test_prompt_and_suffix_stand_where_they_were_put(self, run, pair):
        arguments = ("--length", 24, "--prompt", "peace<mask:2>war", "--suffix", "union", "--json", "-m", pair[0])
        _, out, _ = run("sample", "-n", 2, *arguments)
        for text in json.loads(out)["texts"]:
            assert text.startswith("peace") and "war" in text and text.endswith("union")

    def test_saves(self, run, pair, tmp_path):
        status, _, _ = run("sample", "-n", 2, "--length", 8, "-m", pair[0], "--out", tmp_path / "a.jsonl")
        assert status == 0
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [row["index"] for row in rows] == [0, 1]

    def test_a_full_disk_loses_no_texts(self, run, pair, tmp_path, monkeypatch):
        def full(path, write):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("unmask.samples.replace_whole", full)
        status, out, err = run("sample", "-n", 2, "--length", 8, "-m", pair[0], "--out", tmp_path / "a.jsonl")
        assert status == 2 and "--- 1 ---" in out
        assert "a.jsonl' could not be written: No space left on device" in err

    def test_an_output_that_cannot_be_written_is_refused_before_the_run(self, run, pair, tmp_path):
        (tmp_path / "folder.jsonl").mkdir()
        status, out, err = run("sample", "-m", pair[0], "--out", tmp_path / "folder.jsonl")
        assert (status, out) == (2, "") and "folder.jsonl" in err and "sampling" not in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--schedule", "tiny:50% heavy:50%"), "tiny"),
            (("--schedule", "light:3 heavy:4", "--reveal", "ancestral:8"), "8 steps"),
            (("--reveal", "ancestral:0"), "ancestral:0"),
            (("--reveal", "sideways"), "sideways"),
            (("--length", "33"), "32"),
            (("--length", "0"), "length"),
            (("-n", "0"), "num_samples"),
            (("--max-batch", "0"), "max_batch"),
            (("--seed", str(2**64)), "2**64"),
            (("--temperature", "-1"), "temperature"),
            (("--top-k", "0"), "top_k"),
            (("--top-p", "0"), "top_p"),
            (("--dtype", "float16"), "dtype must be float32, bfloat16 or auto, got 'float16'"),
            (("--device", "banana"), "banana"),
            (("--prompt", "peace<mask:0>"), "<mask:0>"),
            (("--prompt", "peace<mask:4"), "<mask:4"),
            (("--threads", "0"), "threads"),
            (("--out", "a.txt"), ".jsonl or .parquet"),
            (("--prompt", "peace " * 40), "prompt"),
            (("-m", "light=elsewhere"), "differ"),
            (("-m", "third=nowhere"), "nowhere"),
        ],
    )
    def test_errors_are_one_line_and_print_nothing(self, run, pair, arguments, message):
        status, out, err = run("sample", "--json", *models(pair), *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("unmask: error: ") and message in err
        assert "Traceback" not in err


class TestPlan:
    def test_json(self, run, pair):
        status, out, _ = run("plan", "-n", 4, "--length", 16, "--reveal", "ancestral:8", "--json", *models(pair))
        found = json.loads(out)
        assert status == 0
        assert found.keys() >= {"events_per_sequence", "ticks", "occupancy", "nfe", "flops", "flops_one_model", "saved"}
        assert found["flops"].keys() == {"blocks", "attention", "head", "total"}
        assert found["flops"]["total"] == sum(found["flops"][key] for key in ("blocks", "attention", "head"))
        assert 0 < found["saved"]["with_head"] < found["saved"]["without_head"] < 0.5

    def test_foretells_the_run(self, run, pair):
        arguments = ("-n", 5, "--length", 16, "--reveal", "ancestral:8", "--seed", 9, "--json", *models(pair))
        planned, stats = json.loads(run("plan", *arguments)[1]), json.loads(run("sample", *arguments)[1])["stats"]
        assert planned["flops"]["total"] == sum(stats["flops"].values())
        for key in ("events", "ticks", "occupancy", "nfe", "saved", "peak_bytes"):
            assert planned[key] == stats[key]

    def test_predicts_seconds_after_one_measurement(self, run, pair):
        arguments = ("plan", "-n", 4, "--length", 16, "--reveal", "ancestral:8", "--json", *models(pair))
        status, out, err = run(*arguments)
        seconds, ticks = json.loads(out)["seconds"], json.loads(out)["ticks"]
        assert status == 0 and err.startswith("measuring how fast this machine is in float32") and err.count("\n") == 1
        assert seconds["total"] == seconds["body"] + seconds["head"] + seconds["other"]
        assert seconds["other"] == 0.5 * ticks and seconds["models"].keys() == {"heavy", "light"}
        assert run(*arguments) == (0, out, "")
        assert "measuring" in run(*arguments, "--recalibrate")[2]
        assert "in bfloat16" in run(*arguments, "--dtype", "bfloat16")[2]

    def test_readable(self, run, pair):
        _, out, _ = run("plan", "-n", 4, "--length", 16, "--reveal", "first-hitting", "-m", pair[0])
        assert "16.0 per sequence" in out and "first-hitting" in out and "predicted" in out
        _, out, _ = run("plan", "-n", 4, "--length", 16, "--reveal", "blocks:8:remask:6:loop:eta=0.1", "-m", pair[0])
        assert "64 tokens to reveal; blocks:8:remask:6:loop:eta=0.1" in out


ADAPTIVE = {
    "confidence:probability:steps=6": unmask.Confidence(steps=6),
    "blocks:8:stop:3:confidence:margin:threshold=0.1": unmask.Blocks(
        unmask.Confidence("margin", threshold=0.1), 8, stop_id=3
    ),
    "remask:6:conf": unmask.RemaskConfidence(6),
}


class TestAdaptive:
    """Policies that the network decides, and what goes with them."""

    @pytest.mark.parametrize("text", ADAPTIVE)
    def test_samples_are_those_of_the_library(self, run, pair, text):
        arguments = ("-n", 3, "--length", 16, "--prompt", "peace", "--seed", 4, "--reveal", text, "--json")
        choices = ("--guidance", 0.5, "--suppress", "5,6", "--begin-suppress", "7")
        status, out, err = run("sample", *arguments, *choices, "-m", pair[0])
        choose = unmask.Categorical(suppress=(5, 6), begin_suppress=(7,))
        sampler = unmask.Sampler(unmask.load(pair[0]), reveal=ADAPTIVE[text], choose=choose, guidance=0.5)
        assert json.loads(out)["tokens"] == sampler.sample(3, 16, prompt="peace", seed=4).tokens.tolist()
        assert status == 0 and "100%" in err

    @pytest.mark.parametrize("text", ADAPTIVE)
    def test_profiles_become_reports(self, run, pair, text, tmp_path):
        arguments = ("-n", 3, "--length", 16, "--reveal", text, "--out", tmp_path / "run.json")
        status, out, _ = run("profile", *arguments, "--guidance", 0.5, "--suppress", 5, "--json", *models(pair))
        found = json.loads(out)
        request = {"reveal": text, "guidance": 0.5, "suppress": [5], "begin_suppress": [], "caching": None}
        assert status == 0 and not found["partial"] and found["request"].items() >= request.items()
        total = found["phases"].pop("total")
        assert sum(found["phases"].values()) == pytest.approx(total)
        status, _, err = run("report", tmp_path / "run.json", "-o", tmp_path / "report.html")
        assert (status, err) == (0, "") or "report.html" in err
        assert text in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize("text", ADAPTIVE)
    def test_schedules_are_evaluated(self, run, pair, text):
        named = models(pair)[:4]
        arguments = ("-n", 10, "--length", 16, "--data", "none", "--reveal", text, "--json")
        both = ("--schedule", "heavy:100%", "--schedule", "light:50% heavy:50%")
        status, out, _ = run("study", "evaluate", *arguments, *both, *named)
        assert status == 0 and json.loads(out)["reveal"] == text
        status, out, err = run("study", "search", *arguments[:4], "--reveal", text, "--out", "x", "--scorer", "none")
        assert (status, out) == (2, "") and "unmask: error: " in err

    def test_search_needs_a_plan(self, pair):
        sources = {"heavy": unmask.load(pair[0]), "light": unmask.load(pair[1])}
        for policy in (*ADAPTIVE.values(), unmask.Blocks(unmask.Confidence(per_step=2), 4)):
            with pytest.raises(ValueError, match="reveal must be a planned policy, whose steps all schedules share"):
                Prices(sources, policy, num_samples=2, length=8, seed=0)

    def test_plan_counts_guided_calls_and_says_what_has_none(self, run, pair):
        arguments = ("-n", 2, "--length", 16, "-m", pair[0], "--json", "--reveal", "confidence:probability:steps=6")
        plain, guided = (json.loads(run("plan", *arguments, "--guidance", w)[1])["events"] for w in (0, 1))
        assert (plain, guided) == (12, 24)
        for text in list(ADAPTIVE)[1:]:
            status, out, err = run("plan", *arguments[:-1], text)
            assert (status, out) == (2, "")
            assert err.endswith(f"reveal must fix how many positions each step reveals, for a plan, got {text}\n")
            assert "measuring" not in run("plan", *arguments[:-1], text, "--recalibrate")[2]  # refused before that

    def test_caching(self, run, tmp_path, pair):
        folder = write_folder(tmp_path / "causal", LLAMA, state_of())
        run("convert", folder, "--mask-id", 33, "--out", tmp_path / "made")
        arguments = ("-n", 2, "--length", 16, "--reveal", "blocks:8:confidence:probability:steps=4", "--temperature", 0)
        reveal = unmask.Blocks(unmask.Confidence(steps=4), 8)
        options = {"reveal": reveal, "choose": unmask.Categorical(0.0)}
        for text, caching in (("prefix", unmask.Caching()), ("dual:2", unmask.Caching("dual", refresh=2))):
            status, out, _ = run("sample", *arguments, "-m", tmp_path / "made", "--caching", text, "--json")
            expected = unmask.Sampler(unmask.load(tmp_path / "made"), caching=caching, **options).sample(2, 16)
            assert status == 0 and json.loads(out)["tokens"] == expected.tokens.tolist()
            assert json.loads(out)["stats"]["flops"] == expected.stats.to_json()["flops"]
        status, out, _ = run("profile", *arguments, "-m", tmp_path / "made", "--caching", "dual:2", "--json")
        assert status == 0 and json.loads(out)["request"]["caching"] == "dual:2"
        status, out, err = run("sample", *arguments, "-m", pair[0], "--caching", "dual")
        assert (status, out) == (2, "") and "which cannot keep keys and values" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--suppress", "3,x"), "suppress must be token ids such as 3,17, got '3,x'"),
            (("--begin-suppress", ""), "begin-suppress must be token ids such as 3,17, got ''"),
            (("--suppress", "999"), "suppress must hold ids from 0 to 263, got 999"),
            (("--guidance", "-1"), "guidance must be a finite number, 0 or above, got -1.0"),
            (("--caching", "half"), "kind must be one of prefix, dual, got 'half'"),
            (("--caching", "dual:x"), "caching must be prefix or dual, or KIND:N such as prefix:8, got 'dual:x'"),
            (("--caching", "dual:0"), "refresh must be at least 1, got 0"),
            (("--caching", "dual"), "caching must be None with a planned policy, ancestral:256"),
            (("--reveal", "confidence:probability"), "confidence:probability"),
            (("--reveal", "blocks:4:stop:3:remask:4:conf"), "stop_id must be None for the remasking policy"),
        ],
    )
    def test_errors_are_one_line(self, run, pair, arguments, message):
        status, out, err = run("sample", "--length", 8, "-m", pair[0], *arguments)
        assert (status, out) == (2, "") and err.startswith("unmask: error: ") and message in err
        assert err.count("\n") == 1

    def test_help_spells_them(self, run):
        words = "".join(run("sample", "--help")[1].replace("│", "").split())
        for spelling in ("confidence:SCORE:RULE", "remask:STEPS:conf", "blocks:LENGTH:stop:TOKEN:POLICY", "--caching"):
            assert spelling in words


class TestInfo:
    def test_names_every_implementation_and_why(self, run):
        status, out, _ = run("info", "--json")
        found = json.loads(out)
        lines = [line for line in found["operators"] if line["operator"] == "sample_head"]
        assert status == 0
        assert {line["implementation"] for line in lines} >= {"reference", "cpu"}
        assert sum(line["picked"] for line in lines) == 1 and all(line["reason"] for line in lines)

    def test_readable(self, run):
        assert "sample_head" in run("info")[1]


class TestTrain:
    def test_trains_goes_on_and_samples(self, run, texts, tmp_path):
        out = tmp_path / "run"
        sizes = ("--vocab-size", 264, "--blocks", 1, "--hidden-dim", 16, "--length", 16, "--batch-size", 2)
        arguments = ("train", "--data", texts, "--out", out, *sizes, "--dtype", "float32", "--steps")
        status, printed, err = run(*arguments, 3)
        assert status == 0 and "held-out bound" in printed and "step 3/3" in err
        status, printed, err = run(*arguments, 5, "--json")
        assert status == 0 and "step 5/5" in err and "step 3/" not in err
        assert json.loads(printed)["seen_tokens"] == 5 * 2 * 16
        status, printed, _ = run("sample", "-n", 1, "-m", out, "--json")
        assert status == 0 and len(json.loads(printed)["tokens"][0]) == 16

    def test_error(self, run, tmp_path):
        status, out, err = run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
        assert (status, out) == (2, "") and "nowhere" in err
        assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("command", ["sample", "plan", "info", "train"])
def test_help_shows_an_example(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"unmask {command}" in " ".join(out.split("Example:")[1].split())


class TestProgress:
    @pytest.fixture
    def sampler(self, pair):
        return unmask.Sampler(unmask.load(pair[0]), reveal=unmask.Fixed(8), max_batch=2)

    def test_texts_unmask_on_a_terminal(self, sampler):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=80, height=40)
        view = Unmasking(console, sampler.tokenizer, sampler.mask_id, num_shown=3)
        view.last = float("inf")
        samples = sampler.sample(4, 32, progress=view)
        expected = [strip_control_codes(text.replace("\n", " ")) for text in samples.text[:3]]
        assert [view.texts[i].plain for i in range(3)] == expected
        assert "128/128 tokens" in screen.getvalue() and "░░░" in screen.getvalue()

    @pytest.mark.parametrize(("height", "shown"), [(45, 8), (24, 5), (6, 1)])
    def test_the_view_never_grows_beyond_the_screen(self, sampler, height, shown):
        console = Console(file=io.StringIO(), force_terminal=True, width=60, height=height)
        view = Unmasking(console, sampler.tokenizer, sampler.mask_id)
        sampler.sample(8, 32, progress=view)
        lines = console.render_lines(view.render(), pad=False)
        assert view.num_shown == shown and len(lines) <= height

    def test_plain_lines_end_at_all_tokens(self, sampler):
        file = io.StringIO()
        sampler.sample(3, 32, progress=Lines(file))
        assert file.getvalue().splitlines()[-1].startswith("sampling: 100%, 96 of 96 tokens, 3 of 3 sequences")

    def test_a_stop_ends_a_text_for_all_to_see(self, pair):
        stops = unmask.Blocks(unmask.Confidence(threshold=0.01), 4, stop_id=30)
        sampler = unmask.Sampler(unmask.load(pair[0]), reveal=stops, max_batch=2)
        file = io.StringIO()
        samples = sampler.sample(12, 32, progress=Lines(file))
        assert (samples.tokens[:, -4:] == 30).all(1).any() and samples.stats.events < 12 * 32
        last = file.getvalue().splitlines()[-1]
        assert last.startswith("sampling: 100%, 384 of 384 tokens, 12 of 12 sequences")

    def test_lines_before_anything_is_revealed(self):
        file = io.StringIO()
        view = Lines(file)
        view.start(1, 8, ["a"])
        view.last = -float("inf")
        view.update(None, SimpleNamespace(num_revealed=0, finished=torch.tensor([False])))
        assert file.getvalue().startswith("sampling:   0%, 0 of 8 tokens, 0 of 1 sequences, 0 s\n")

    @pytest.mark.parametrize("text", ADAPTIVE)
    def test_texts_unmask_as_the_network_decides(self, pair, text):
        sampler = unmask.Sampler(unmask.load(pair[0]), reveal=ADAPTIVE[text], max_batch=2)
        screen = io.StringIO()
        view = Unmasking(Console(file=screen, force_terminal=True, width=80, height=40), sampler.tokenizer, 263)
        view.last = float("inf")
        samples = sampler.sample(4, 32, progress=view)
        texts = [strip_control_codes(text.replace("\n", " ")) for text in samples.text]
        assert [view.texts[i].plain for i in range(4)] == texts
        assert view.bar.tasks[0].completed == 4 * 32

    def test_bar(self, sampler):
        screen = io.StringIO()
        sampler.sample(2, 32, progress=Bar(Console(file=screen, force_terminal=True, width=80)))
        assert "64/64 tokens" in screen.getvalue()

    def test_terminal_decides(self, monkeypatch):
        assert isinstance(Progress.on_stderr(), Lines)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert isinstance(Progress.on_stderr(), Bar)

    def test_view_does_not_change_the_samples(self, sampler):
        console = Console(file=io.StringIO(), force_terminal=True)
        seen = sampler.sample(3, 32, progress=Unmasking(console, sampler.tokenizer, sampler.mask_id))
        assert (seen.tokens == sampler.sample(3, 32).tokens).all()
