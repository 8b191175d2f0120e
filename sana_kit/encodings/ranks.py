"""The ranks that encode together."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from sana_kit.encodings.store import refresh_listing, remove_stale
from sana_kit.errors import EncodingStopped, StoreError

SHARED_SECONDS = 10.0  # after that a store that shows no file of another machine's rank counts as not shared


class EncodingTeam:
    """The ranks that encode together: those that see the same store folder."""

    def __init__(self, accelerator, store: Path):
        self.accelerator, self.store = accelerator, store
        self.members = [accelerator.process_index]
        self.token: str | None = None

    def gather(self, item) -> list:
        """The items of all ranks, in rank order."""
        if self.accelerator.num_processes == 1:
            return [item]
        from accelerate.utils import gather_object

        return gather_object([item])

    def meet(self):
        """Find out which ranks share the store: each leaves a file there and looks whose it sees."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes

        def prepare():
            try:
                for part in ("latents", "prompts"):
                    (self.store / part).mkdir(parents=True, exist_ok=True)
                    remove_stale(self.store / part)
                remove_stale(self.store)
                (self.store / f".probe-{token}-{rank}").touch()
            except OSError as error:
                raise StoreError(
                    f"Encodings: {self.store} cannot be written ({error.strerror}). Choose another folder for them."
                ) from None

        token = self.gather(uuid.uuid4().hex)[0]
        self.token = token
        self.run(prepare)
        if world == 1:
            return
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
        deadline = time.monotonic() + SHARED_SECONDS
        while True:
            seen = sorted(int(p.name.rsplit("-", 1)[1]) for p in self.store.glob(f".probe-{token}-*"))
            # Ranks of one machine always share the folder; those of others may, and then show within a few seconds.
            if len(seen) == world or local == world or time.monotonic() > deadline:
                break
            refresh_listing(self.store)
            time.sleep(0.2)
        views = self.gather(seen)
        self.members = seen
        if any(views[other] != seen for other in seen):
            raise StoreError(
                f"Encodings: the ranks disagree on who shares {self.store} ({views}). Put the encodings on a file"
                " system that all machines share, or on one that each machine has for itself."
            )

    def share(self, items) -> list:
        """This rank's part of a list that is alike on all ranks."""
        return list(items)[self.members.index(self.accelerator.process_index) :: len(self.members)]

    def failed(self) -> bool:
        """Whether another rank has failed, so that going on is useless."""
        return self.token is not None and (self.store / f".failed-{self.token}").exists()

    def run_alone(self, job):
        """Run `job` on this rank and return its own result; any rank's error is raised on all ranks."""
        result, error = None, None
        try:
            result = job()
        except Exception as caught:
            error = caught
            if self.token is not None and self.accelerator.num_processes > 1:
                try:
                    (self.store / f".failed-{self.token}").touch()
                except OSError:
                    pass
        if self.accelerator.num_processes == 1:
            if error is not None:
                raise error
            return result
        verdict = None if error is None else (type(error).__name__, str(error))
        verdicts = self.gather(verdict)
        failures = [(rank, v) for rank, v in enumerate(verdicts) if v is not None]
        if failures:
            # A rank that only stopped because another failed has nothing to say.
            telling = [f for f in failures if f[1][0] != "OtherRankFailed"] or failures
            kinds = {"ValueError": ValueError, "StoreError": StoreError, "EncodingStopped": EncodingStopped}
            kind = kinds.get(telling[0][1][0], RuntimeError)
            text = "\n".join(dict.fromkeys(f"rank {rank}: {message}" for rank, (_, message) in telling))
            raise kind(text) from error
        return result

    def run(self, job) -> list:
        """Run `job` on every rank and return all results; any rank's error is raised on all ranks."""
        return self.gather(self.run_alone(job))

    def part(self):
        """Remove this rank's traces from the store."""
        if self.token is not None:
            for name in (f".probe-{self.token}-{self.accelerator.process_index}", f".failed-{self.token}"):
                try:
                    (self.store / name).unlink(missing_ok=True)
                except OSError:  # a store that cannot be written has its own error
                    pass


class OtherRankFailed(RuntimeError):
    """Ends a rank's share early; the failed rank's own error is what gets raised."""


def check_stop(team: EncodingTeam, should_stop):
    if should_stop is not None and should_stop():
        raise EncodingStopped("Encoding was stopped on request; start again to go on where it was.")
    if team.failed():
        raise OtherRankFailed("another rank failed")
