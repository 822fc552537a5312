"""Folder and file names of a generated project. No other module spells a path."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import failure


@dataclass(frozen=True)
class Project:
    """A generated project, known by its root folder (absolute)."""

    root: Path
    smoke: bool = False
    """Whether results go to where a smoke run keeps its own."""
    olive: bool = False
    """Whether results are those that stock Olive made."""

    @classmethod
    def find(cls, start: Path) -> "Project":
        """Return the project that ``start`` lies in. Raises EdgetuneError when there is none."""
        start = Path(os.path.abspath(start))  # noqa: PTH100 - Path.absolute keeps "..", resolve follows links
        for folder in (start, *start.parents):
            if cls(folder).config.is_file():
                return cls(folder)
        raise failure(
            f"no edgetune project in {start} or above it (there is no fine-tuning/olive-config.json)",
            hint="start one with `copier copy <edgetune repository> my-slm`, then run the command inside it",
        )

    def name(self, path: Path) -> str:
        """Return ``path`` as messages show it: relative to the project where it lies inside."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    @property
    def config_folder(self) -> Path:
        """The folder the workflow file's relative paths start from."""
        return self.root / "fine-tuning"

    @property
    def config(self) -> Path:
        """The Olive workflow file, the only configuration."""
        return self.config_folder / "olive-config.json"

    @property
    def job(self) -> Path:
        """The job of Azure ML that runs the project."""
        return self.config_folder / "azureml-job.yml"

    @property
    def conda(self) -> Path:
        """The environment of that job."""
        return self.root / "setup" / "conda.yaml"

    @property
    def olive_cache(self) -> Path:
        """Stock Olive's cache (git-ignored)."""
        return self.config_folder / "cache"

    def split_file(self, role: str) -> Path:
        """Return where ``edgetune data --write-split`` puts the rows for ``train`` or ``eval``."""
        return self.root / "datasets" / f"{role}.jsonl"

    @property
    def pending_split(self) -> Path:
        """The workflow file of a split whose files are all written and not yet in their places."""
        file = self.config.resolve()
        return file.with_name(file.name + ".split")

    @property
    def answers(self) -> Path:
        """What copier was told, and the version of the template it rendered."""
        return self.root / ".copier-answers.yml"

    @property
    def requirements(self) -> Path:
        """The runtime and the exact versions of its packages."""
        return self.root / "setup" / "requirements.txt"

    def own_files(self) -> Iterator[Path]:
        """Yield the files that no command made, those of environments and hidden tools left out."""
        made = {self.model_cache, self.results, self.olive_cache}
        for folder, names, files in os.walk(self.root):
            names[:] = sorted(
                name
                for name in names
                if Path(folder, name) not in made
                and (not name.startswith(".") or name == ".github")
                and not Path(folder, name, "pyvenv.cfg").exists()
            )
            yield from (Path(folder, file) for file in sorted(files))

    @property
    def model_cache(self) -> Path:
        """Base models, ``<org>/<name>/`` each."""
        return self.root / "model-cache"

    @property
    def lock(self) -> Path:
        """Revision, size and sha256 of every file of the base model."""
        return self.root / "setup" / "model.lock.json"

    @property
    def dotenv(self) -> Path:
        """The user's token and endpoint of the Hub (git-ignored)."""
        return self.root / ".env"

    @property
    def results(self) -> Path:
        """Everything the runtime makes."""
        return self.gen_model / "smoke" if self.smoke else self.olive_output if self.olive else self.gen_model

    @property
    def gen_model(self) -> Path:
        """The folder of everything that is made, by other engines and smoke runs too."""
        return self.root / "gen-model"

    def stage_folder(self, stage: str) -> Path:
        """Return the folder a stage publishes."""
        names = {"train": "adapter", "merge": "merged", "export": "onnx.candidate", "verify": "onnx"}
        return self.results / names.get(stage, stage)

    @property
    def adapters(self) -> Path:
        """Adapters of other projects, for the exported model."""
        return self.gen_model / "adapters"

    @property
    def refused_model(self) -> Path:
        """Where ``verify`` sets an exported model aside that did not pass."""
        return self.results / "onnx.rejected"

    @property
    def verdict(self) -> Path:
        """What ``verify`` found."""
        return self.results / "verify.json"

    @property
    def rejected(self) -> Path:
        """The rows that were left out, with the reasons."""
        return self.stage_folder("data") / "rejected.jsonl"

    @property
    def smoke_record(self) -> Path:
        """What the last smoke run found."""
        return self.gen_model / "smoke" / "smoke.json"

    def smoke_rows(self, data: str) -> Path:
        """Return the rows that a smoke run takes of a data set."""
        return self.results / "rows" / f"{data}.jsonl"

    @property
    def evaluation(self) -> Path:
        """What every backend answered to the evaluation data."""
        return self.results / "evaluation"

    @property
    def metrics(self) -> Path:
        """What ``evaluate`` found."""
        return self.results / "report" / "metrics.json"

    def report(self, kind: str) -> Path:
        """Return the report as ``html`` or ``md``."""
        return self.results / "report" / f"report.{kind}"

    @property
    def package(self) -> Path:
        """What is deployed: the model, its card, licences and checksums."""
        return self.results / "package"

    @property
    def archive(self) -> Path:
        """The package as one file."""
        return self.results / f"{self.root.name}.zip"

    @property
    def olive_output(self) -> Path:
        """Where the workflow file tells stock Olive to put its model."""
        return self.gen_model / "olive"

    @property
    def olive_cache_key(self) -> Path:
        """What the results in stock Olive's cache depend on."""
        return self.olive_cache / "edgetune.json"

    @property
    def events(self) -> Path:
        """Progress of all runs, one JSON object a line."""
        return self.results / "events.jsonl"

    @property
    def run_lock(self) -> Path:
        """Held while a command writes into the project."""
        return self.gen_model / ".lock"

    @property
    def job_lock(self) -> Path:
        """Held while one of several processes prepares the project."""
        return self.gen_model / ".job.lock"

    @property
    def fetched(self) -> Path:
        """Where the results of a job arrive before they are put in their places."""
        return self.gen_model / "azureml.partial"

    @property
    def hash_cache(self) -> Path:
        """Known sha256 of large files by size, times and inode."""
        return self.gen_model / ".hashes.json"

    def log(self, stage: str) -> Path:
        """Return the file that keeps what the libraries print during a stage."""
        return self.results / "logs" / f"{stage}.log"

    def tracker_folder(self, name: str) -> Path:
        """Return where an experiment tracker keeps its files."""
        return self.results / "logs" / name

    def outputs(self, backend: str) -> Path:
        """Return the default file for answers to ``--prompts``."""
        return self.root / "inferences" / f"outputs-{'olive-' if self.olive else ''}{backend}.jsonl"


BUILTIN_MODELS = {"edgetune/tiny-phi3": Path(__file__).parent / "builtin" / "tiny-phi3"}
"""Base models that come with the package. They never fall back to the Hub."""
