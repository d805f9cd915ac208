"""The main job, from names to files: what ``oracle diagnose`` and ``oracle demo`` run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from toolkit.diagnosis.diagnose import diagnose
from toolkit.diagnosis.options import Options
from toolkit.diagnosis.other_data import OtherData, OtherFiles
from toolkit.diagnosis.run import Run
from toolkit.diagnosis.workspace import Workspace, refuse_existing
from toolkit.documents.corpus import Corpus, DataFile
from toolkit.errors import one_line
from toolkit.models.loading import parse_dtype, require_device
from toolkit.models.outline import Outline, outline
from toolkit.models.pair import ModelPair
from toolkit.planning.estimate import RunPlan, plan
from toolkit.planning.free_memory import require_memory
from toolkit.report.folder import publish
from toolkit.report.next_steps import paths_from
from toolkit.runtime.console import errors
from toolkit.runtime.processes import LostProcessError, Processes, joined


@dataclass(frozen=True)
class Job:
    """Hold what to compare, on what, how, and where the results go.

    `other` names what is looked at beside the data.
    """

    base: str
    tuned: str
    data: Path
    out: Path
    options: Options = field(default_factory=Options)
    dtype: str = "float32"
    device: str = "cpu"
    keep_statistics: bool = False
    overwrite: bool = False
    show: bool = True
    memory_check: bool = True
    offload: bool = False
    other: OtherFiles = field(default_factory=OtherFiles)

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        require_device(self.device)
        object.__setattr__(self, "out", self.out.resolve())  # a link stays one


def run_job(job: Job) -> Run | None:
    """Run `job` and write its folder. The run; None in all processes but the first.

    An interrupted job goes on where it stopped.
    """
    try:
        with joined(job.device) as processes:
            run = _run_in(processes, job)
            processes.wait()
    except LostProcessError as lost:
        errors.print(
            f"oracle: another process of this run ended ({one_line(lost)}); the same command, with "
            f"any number of processes, goes on from {_workspace_folder(job)}"
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print(f"interrupted; the same command goes on from {_workspace_folder(job)}")
        raise typer.Exit(130) from None
    return run if processes.first else None


def _run_in(processes: Processes, job: Job) -> Run:
    processes.from_first(lambda: refuse_existing(job.out, job.overwrite))
    data = DataFile.read(job.data)
    other = job.other.read(data.documents)
    corpus = None
    if job.memory_check:
        known = outline(job.base, job.tuned)
        corpus = Corpus.of(data.documents, known.tokenizer, **job.options.reading)
        # The first process asks for all, before any of them has read a model.
        processes.from_first(lambda: _ask_for_memory(job, known, corpus, other))
    pair = ModelPair.load(job.base, job.tuned, job.dtype, job.device, job.offload)
    request = {
        "base": pair.hashes[0],
        "tuned": pair.hashes[1],
        "data": data.sha256,
        "options": vars(job.options),
        "other": other.identity,
        "keep_statistics": job.keep_statistics,
    }
    workspace = Workspace(job.out, request, job.keep_statistics, processes)
    with workspace.opened():
        run = diagnose(
            pair,
            corpus or data.documents,
            job.options,
            other=other,
            show_progress=job.show,
            workspace=workspace,
            processes=processes,
        )
    if processes.first:
        run.info["data"].update(file=str(job.data), sha256=data.sha256)
        run.info["other_data"] = other.identity
        run.info["paths"] = _paths(job)
        publish(run, workspace.folder)
        workspace.close()
    return run


def _paths(job: Job) -> dict[str, str]:
    """Return where the run's inputs are, from its folder: its report's commands name them so."""
    questions = job.other.test or job.other.answers
    more = {"questions": questions} if questions else {}
    return paths_from(job.out, base=job.base, tuned=job.tuned, data=job.data, **more)


def _ask_for_memory(job: Job, known: Outline, corpus: Corpus, other: OtherData) -> None:
    """Refuse a run that needs more memory than is free; one that cannot be planned goes on."""
    try:
        places = _plan(job, known, corpus, other, False).places
    except Exception as error:  # a family whose shapes are not read yet may run all the same
        errors.print(f"the memory that this run needs is not known ({one_line(error)})")
        return
    require_memory(places)


def plan_job(job: Job, timed: bool = True) -> RunPlan:
    """Plan what `job` would cost: no weights are read, nothing is written."""
    documents = DataFile.read(job.data).documents
    other = job.other.read(documents)
    return _plan(job, outline(job.base, job.tuned), documents, other, timed)


def _plan(job: Job, known: Outline, documents: Any, other: OtherData, timed: bool) -> RunPlan:
    return plan(
        known,
        documents,
        job.options,
        job.dtype,
        job.device,
        timed=timed,
        offload=job.offload,
        keep_statistics=job.keep_statistics,
        other=other,
    )


def _workspace_folder(job: Job) -> Path:
    return Workspace(job.out, {}).folder
