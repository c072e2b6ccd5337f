"""A run, phase by phase: check the settings, read the rows, build the models, train, save."""

from __future__ import annotations

import logging
from collections.abc import Collection
from types import TracebackType
from typing import Any

from alignkit import registry
from alignkit.config import RunConfig, split
from alignkit.engine import assemble, reading
from alignkit.engine.loop import Loop
from alignkit.engine.model_folder import check_space, save_model
from alignkit.engine.saving import check_rows
from alignkit.engine.state import RunState, Splits
from alignkit.environments.build import prepared
from alignkit.lora_settings import LoraSettings
from alignkit.models.loading import load_tokenizer
from alignkit.models.ranks import SINGLE, Ranks
from alignkit.reference.choice import check_reference
from alignkit.rollout.checks import check_online
from alignkit.rollout.own_servers import own_servers
from alignkit.runs import config_file, fingerprints
from alignkit.runs import folder as run_folder
from alignkit.runs.callbacks import load_callbacks
from alignkit.runs.folder import read_metrics
from alignkit.runs.lock import FolderLock
from alignkit.runs.results import unlearned
from alignkit.runs.sessions import Session
from alignkit.runs.upload import check_upload, upload
from alignkit.unused import check_used

logger = logging.getLogger(__name__)


class Run:
    """One run, to be used in a `with`. `Engine.run` calls its phases in order: read(), build(), loop.train(), save().

    To measure a phase, call them one at a time, as benchmarks/engine.py does; `loop.step(i, total)` is one step.
    splits: the rows, after `read`. state, loop: after `build`. shared: names of settings that may be without effect,
    because other runs have them too. Raises AlignkitError on invalid settings.
    """

    splits: Splits
    state: RunState
    loop: Loop
    ranks: Ranks = SINGLE  # after `build`, those of the run
    _lock: FolderLock | None = None

    def __init__(self, method: str, shared: Collection[str] = (), **settings: Any) -> None:
        self._session = Session()
        cls = registry.get(method)
        config, method_config = split({**settings, "method": method}, cls.Config)
        self.method = cls(method_config)
        dated = config.model_copy(update={"template_date": config_file.start_date(config)})
        self.config = prepared(dated, self.method.roles())
        check_used(self.config, self.method, shared)
        check_reference(self.config, self.method)
        check_online(self.config, self.method)
        check_upload(self.config.push_to_hub)
        self._callbacks = load_callbacks(self.config.callbacks)
        self.tokenizer = load_tokenizer(self.config)

    def read(self) -> Splits:
        """Read, check and tokenise the rows. Raises DataError."""
        self.splits = reading.read(self.config, self.method, self.tokenizer, keep=self.config.rows_cache)
        return self.splits

    def build(self) -> RunState:
        """Create the run's folder, load the models and fill the reference's cache. Raises AlignkitError."""
        accelerator = assemble.accelerator_for(self.config, self.method)
        self.ranks = Ranks(accelerator, self.config.timeout_minutes)
        folder = run_folder.create(self.config, accelerator)
        config = self.config.model_copy(update={"name": folder.name})
        written = {**config.describe(), **self.method.config.model_dump(mode="json")}
        self._lock = FolderLock(folder)
        with run_folder.undone(folder, made=not config.resume), own_servers(config, folder, self.ranks) as own:
            if accelerator.is_main_process:
                self._lock.take()
            if accelerator.is_main_process:
                moved = fingerprints.check(folder, config)
                config_file.write_config(folder, written, config.resume, self._defaults(), moved)
            logger.info("run: %s", folder)
            if config.resume:
                check_rows(folder, self.splits)
            parts = assemble.build(config, self.method, self.splits, self.tokenizer, self.ranks, own)
            self.state = RunState(config, self.method, self.splits, parts, folder, written, callbacks=self._callbacks)
            if accelerator.is_main_process:
                check_space(self.state)
        self.loop = Loop(self.state, self._session)
        return self.state

    def _defaults(self) -> dict[str, Any]:
        """Return the default of every setting that a run of an earlier version may lack."""
        unset = RunConfig(method="", model="-", data="-", template_date=self.config.template_date)
        lora = {"lora": LoraSettings().model_dump()} if self.config.lora is not None else {}
        return {**unset.describe(), **lora, **type(self.method.config)().model_dump(mode="json")}

    def told(self) -> None:
        """Warn where the run has learned next to nothing. Methods that sample have an alarm for this, `kl_low`."""
        if not self.ranks.is_main or self.method.data == "prompts":
            return
        if found := unlearned(read_metrics(self.state.folder)):
            logger.warning(
                "the loss is %.4g, and was %.4g at the start: the run has learned next to nothing in %d steps at a "
                "learning_rate of %.3g. Raise learning_rate, 10 times at first, or train longer (epochs, max_steps)",
                found[1], found[0], self.state.total_steps, self.state.parts.peak_rate,
            )  # fmt: skip

    def save(self) -> Any:
        """Write model/ into the run's folder and return the model in memory."""
        model = save_model(self.state, self.tokenizer)
        if self.config.push_to_hub is not None and self.ranks.is_main:
            upload(self.state.folder / "model", self.config.push_to_hub)
        return model

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Let other processes write in the run's folder. Raises TrainingError naming ranks that do not answer."""
        try:
            if isinstance(error, Exception) and (told := self.ranks.explained(error)) is not error:
                raise told from error
        finally:
            self.ranks.close(failed=error is not None)
            if self._lock:
                self._lock.close()
