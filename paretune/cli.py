"""The command line. Data goes to stdout, progress to stderr; everything heavy is imported within the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from paretune import __version__
from paretune.errors import JobError, ParetuneError, SearchError
from paretune.search.signals import sigterm_raises

app = typer.Typer(
    help="Search pruning, quantization and distillation together for the best accuracy at each measured latency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="The job file.")]
JobPaths = Annotated[list[Path], typer.Argument(metavar="JOB...", help="The job file, or several.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-o", metavar="KEY=VALUE", help="Override a key, e.g. search.trials=20."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SubmittedId = Annotated[str, typer.Argument(metavar="ID", help="What `paretune submit` printed.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard, e.g. http://HEAD:8265; RAY_ADDRESS, or one found here."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure anew what the cache knows of this machine.")]


def main() -> None:
    """Run the command line; the exit codes are those of docs/cli.md."""
    with sigterm_raises(), _exit_codes():
        app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except JobError as error:
        _fail(error, 2)
    except ParetuneError as error:
        _fail(error, 1)


def _fail(error: ParetuneError, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    trials: Annotated[int, typer.Option(help="Number of trials.", min=1)] = 56,
    results: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("results"),
) -> None:
    """Train a small net on digits, search for two or three minutes, and show the front and the report."""
    from paretune.search.demo import demo_job
    from paretune.search.run import run

    with _progress() as report:
        folder = run(demo_job(results, trials=trials, report=report), report=report)
    show(folder)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")] = Path(),
) -> None:
    """Write a job file with every key explained, and a model and data to replace by yours."""
    from paretune.search.init import init_project

    for path in init_project(folder):
        typer.echo(path)


@app.command()
def check(
    job: JobPath,
    override: Overrides = None,
    as_json: AsJson = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also show at which channel counts the target gets faster, and where slack is."),
    ] = False,
    heatmap: Annotated[
        Path | None,
        typer.Option("--heatmap", metavar="FILE.svg", dir_okay=False, help="Draw the slack too; implies --profile."),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Say what can be pruned and what can't and why, what there is to choose, and what the search will cost."""
    from paretune.search.check import check as check_job
    from paretune.search.heatmap import draw_heatmap
    from paretune.search.job import load_job
    from paretune.search.show import print_check, print_json, print_staircases
    from paretune.search.slack import print_slack

    loaded = load_job(job, override or [])
    with _progress() as report:
        found = check_job(loaded, deep=profile or heatmap is not None, fresh=fresh, report=report)
    if heatmap is not None and found.slack is not None:
        heatmap.parent.mkdir(parents=True, exist_ok=True)
        heatmap.write_text(draw_heatmap(found.slack, loaded.name), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
    else:
        print_check(found)
        print_staircases(found.staircases)
        if found.slack is not None:
            print_slack(found.analysis, found.slack)


@app.command()
def doctor(as_json: AsJson = False, fresh: Fresh = False) -> None:
    """Say which runtimes work here, which bit-widths they really execute, and what may spoil measurements."""
    from paretune.search.doctor import diagnose, print_diagnosis
    from paretune.search.show import print_json

    with _progress() as report:
        found = diagnose(fresh=fresh, report=report)
    if as_json:
        print_json(found.to_dict())
    else:
        print_diagnosis(found)
    if not found.works:
        raise SearchError("a runtime must work on this machine, but none does; see the reasons above")


@app.command()
def run(
    jobs: JobPaths,
    override: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with runs that exist, begin the others.")] = False,
) -> None:
    """Search a job to its verified front, or several, one after the other."""
    if len(jobs) > 1:
        _run_batch(jobs, override or [], resume)
    from paretune.search.batch import run_or_resume
    from paretune.search.job import load_job

    loaded = load_job(jobs[0], override or [])
    from paretune.search.run import run as run_job

    with _progress() as report:
        folder = run_or_resume(loaded, report=report) if resume else run_job(loaded, report=report)
    show(folder)


def _run_batch(jobs: list[Path], overrides: list[str], resume: bool) -> NoReturn:
    from paretune.search.batch import exit_code, run_batch, summary

    ended = run_batch(jobs, overrides, resume=resume, report=lambda line: typer.echo(line, err=True))
    typer.echo(summary(ended))
    raise typer.Exit(exit_code(ended))


@app.command()
def submit(
    job: JobPath,
    override: Overrides = None,
    address: Address = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out of what is sent, as in .gitignore, e.g. data/; several times."),
    ] = None,
) -> None:
    """Send a job to a Ray cluster, which gets a copy of the job file's folder; prints its ID."""
    from paretune.search.submit import Cluster, make_submission

    submission = make_submission(job, override or [], exclude=exclude or [])
    typer.echo(job_id := Cluster(address).submit(submission))
    given = f" --address {address}" if address else ""
    typer.echo(f"{submission.name} runs to {submission.run}; paretune logs {job_id} --follow{given}", err=True)


@app.command()
def status(
    job_id: Annotated[str | None, typer.Argument(metavar="ID", help="A submitted job; all without it.")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Say how jobs are that were submitted."""
    from paretune.search.submit import Cluster, as_row

    cluster = Cluster(address)
    rows = [as_row(job) for job in ([cluster.details(job_id)] if job_id else cluster.jobs())]
    if as_json:
        from paretune.search.show import print_json

        print_json(rows[0] if job_id else rows)
        return
    for row in rows:
        typer.echo("  ".join(str(row[key] or "-") for key in ("id", "status", "job")))
    if job_id and rows[0]["message"]:
        typer.echo(rows[0]["message"])


@app.command()
def logs(
    job_id: SubmittedId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Print what a submitted job printed."""
    from paretune.search.submit import Cluster

    cluster = Cluster(address)
    for text in cluster.follow(job_id) if follow else [cluster.logs(job_id)]:
        typer.echo(text, nl=False)


@app.command()
def stop(job_id: SubmittedId, address: Address = None) -> None:
    """End a submitted job, once it has written its files; submit it again to go on."""
    from paretune.search.submit import Cluster

    typer.echo(Cluster(address).stop(job_id).status.value)


@app.command()
def resume(run: RunPath) -> None:
    """Go on with a run that was stopped or killed."""
    from paretune.search.run import resume as resume_run

    with _progress() as report:
        folder = resume_run(run, report=report)
    show(folder)


@app.command()
def show(run: RunPath, as_json: AsJson = False) -> None:
    """Print the front of a run, as it is now."""
    from paretune.search.front_json import read_front
    from paretune.search.show import print_front, print_json

    front = read_front(run)
    if as_json:
        print_json(front)
    else:
        print_front(run, front)


@app.command()
def report(run: RunPath) -> None:
    """Write the report of a run anew, also while it goes on."""
    from paretune.search.report import write_report
    from paretune.search.run import refresh_trials

    refresh_trials(run)
    typer.echo(write_report(run))


@app.command()
def export(
    run: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to make; exports/RUN-trial-N by default.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="This trial.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="The most accurate point at most so slow.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="The fastest point at least so accurate.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The front's knee.")] = False,
) -> None:
    """Copy a model of the front, with a program that runs it, and have that program check it."""
    from paretune.search.export import export as export_point
    from paretune.search.export import pick

    point = pick(run, trial=trial, max_latency_ms=max_latency_ms, min_accuracy=min_accuracy, at_knee=knee)
    destination = output or Path("exports") / f"{run.resolve().name}-trial-{point['trial']}"
    typer.echo(export_point(run, point, destination), err=True)
    typer.echo(destination)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Lines on stderr: above a spinner on a terminal, plain elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False)
        return
    with console.status("searching"):
        yield lambda line: console.print(line, markup=False)
