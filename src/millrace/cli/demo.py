"""demo: a pipeline into four local clouds, a cloud lost, everything found again. Every claim it prints is checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from millrace.catalog.findings import VerifyProgress, VerifyReport
from millrace.catalog.verify import verify
from millrace.catalog.versions import resolve
from millrace.cli.app import app, perform
from millrace.cli.feed import receipt_lines
from millrace.cli.live import RunView, byte_progress, listing_progress
from millrace.cli.options import JsonOption
from millrace.cli.output import Output
from millrace.client.dataset import open_dataset
from millrace.core.errors import RunStopped, UsageError
from millrace.core.facts import RunReport
from millrace.core.units import format_bytes
from millrace.wiring.clock import this_holder
from millrace.wiring.planning import make_plan
from millrace.wiring.running import RunOptions, run_planned
from millrace.wiring.world import open_world

__all__ = ["CLOUDS", "Claim", "Demo"]

CLOUDS: Final = {
    "aws": ("us-east-1", "us"),
    "gcp": ("us-central1", "us"),
    "azure": ("westeurope", "eu"),
    "ibm": ("us-south", "us"),
}
_LOST: Final = "gcp"
_DATASET: Final = "stdlib"
_PIPELINE: Final = """\
dataset: {dataset}
sources:
  - {{url: {url}, include: ["**/*.py"], exclude: ["**/site-packages/**", "**/dist-packages/**"], format: text}}
transforms:
  - sql: "SELECT path, text FROM records WHERE length(text) > 200"
  - validate: {{required: [text], unique: [path]}}
  - tokenize: {{column: text, tokenizer: bytes, pack: 2048}}
shards: {{size: 4MB, block_rows: 32}}
placement: {{replicas: 3, min_clouds: 2, allow: [us, eu]}}
quarantine: {{limit: 2%}}         # the library's tests hold files that are broken on purpose
chunk: 4MB
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """Something the demo says, and whether it was found to be so."""

    text: str
    held: bool


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Work in this new or empty folder and leave it there.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Tasks at once. Default: one per core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show it on this machine: four local clouds, one of them lost, nothing lost."""
    output = Output(as_json=as_json)
    stdlib = Path(sysconfig.get_path("stdlib"))

    async def work() -> Demo:
        with _folder(keep) as folder:
            shown = Demo(folder, stdlib, output, workers or os.cpu_count() or 1)
            await shown.play()
            return shown

    shown = perform(output, work)
    failed = [claim for claim in shown.claims if not claim.held]
    output.document(
        {"held": not failed, "digest": shown.digest, "claims": [asdict(c) for c in shown.claims]}
        | ({"folder": str(keep)} if keep else {})
    )
    if keep is not None:
        output.line(f"it is all still there; look around with: cd {keep} && millrace show {_DATASET}")
    for claim in failed:
        output.say(f"error: this did not hold: {claim.text}")
    if failed:
        raise typer.Exit(1)
    output.line("all of it held", style="bold green")


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="millrace-demo-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        there = sorted(p.name for p in keep.iterdir())
    except OSError as error:
        raise UsageError(f"--keep {keep} can't be used: {error.strerror}; name another folder") from error
    if there:
        raise UsageError(f"--keep {keep} is not empty: it holds {there[0]!r}; name a new folder")
    yield keep


class Demo:
    """The demonstration, step by step.

    Args:
        folder: Empty; the clouds and the state go there.
        corpus: The folder whose Python files are the source.
        output: Where words go.
        workers: Tasks at once.
        check: What verifies and repairs: ``catalog.verify``, or a test's idea of a broken one.

    Attributes:
        claims: What was said so far, and whether it held.
        digest: Of the version that was made; empty before.
    """

    def __init__(
        self, folder: Path, corpus: Path, output: Output, workers: int, *, check: Callable[..., Any] = verify
    ) -> None:
        self.claims: list[Claim] = []
        self.digest = ""
        self._folder = folder
        self._corpus = corpus
        self._output = output
        self._workers = workers
        self._check = check
        self._step = 0

    async def play(self) -> None:
        """All steps. What doesn't hold is noted in ``claims``; only what makes going on senseless is raised.

        Raises:
            MillraceError: a run or a verification could not be done at all.
        """
        self._title(f"A world of four clouds, each a folder of {self._folder}")
        self._write()
        self._title(
            f"The pipeline: Python's own source, from {self._corpus}, to rows of 2,048 tokens in verified shards"
        )
        first = await self._run()
        self.digest = first.digest or ""
        self._say(
            f"{first.rows:,} rows in {first.shards} shards, {first.replicas} replicas, {format_bytes(first.bytes_out)} "
            f"each set; {first.quarantined} broken files set aside by name"
        )
        self._say(f"{first.dataset}@{first.version} is {self.digest}")

        self._title("Verify: every replica is read back and hashed")
        whole = await self._verify()
        self._claim(f"all {whole.replicas} replicas are whole", whole.is_whole and whole.whole == whole.replicas > 0)

        self._title(f"A cloud is lost: {_LOST}")
        before = _contents(self._cloud(_LOST))
        await asyncio.to_thread(shutil.rmtree, self._cloud(_LOST))
        self._say(f"deleted {self._cloud(_LOST)}: {len(before)} objects")
        damaged = await self._verify()
        self._show_findings(damaged)
        missing = {f.object for f in damaged.findings if f.store == f"{_LOST}-main"}
        self._claim(
            f"verify names each of the {len(before)} missing replicas, and nothing is lost",
            not damaged.is_whole and missing == set(before) and damaged.lost == 0,
        )

        self._title("Repair: each is restored from a true copy in another cloud")
        repaired = await self._verify(repair=True)
        self._claim(
            f"{repaired.restored} replicas were written again, read back and hashed",
            repaired.is_whole and repaired.restored == len(before) > 0,
        )

        self._title("Verify again")
        again = await self._verify()
        self._claim(f"all {again.replicas} replicas are whole", again.is_whole and again.whole == whole.whole)
        after = await asyncio.to_thread(_contents, self._cloud(_LOST))
        self._claim(f"{_LOST} holds the same {len(before)} objects, bit for bit", after == before)

        self._title("The same pipeline once more, its chunks in another order")
        second = await self._run(order_seed=7)
        self._say(f"before  {self.digest}")
        self._say(f"after   {second.digest}")
        self._claim("the digest is unchanged", bool(self.digest) and again.digest == second.digest == self.digest)

        self._title("Feed an epoch to a training loop, and lose a cloud in the middle of it")
        await asyncio.to_thread(self._feed)

    # --- steps ------------------------------------------------------------------------------------

    def _write(self) -> None:
        clouds = {
            cloud: {
                "regions": {
                    region: {"jurisdiction": law, "stores": {f"{cloud}-main": {"url": f"file://./clouds/{cloud}"}}}
                }
            }
            for cloud, (region, law) in CLOUDS.items()
        }
        lines = "".join(f"  {cloud}: {json.dumps(spec)}\n" for cloud, spec in clouds.items())
        url = json.dumps("file://" + quote(str(self._corpus)))
        (self._folder / "world.yaml").write_text(f"clouds:\n{lines}", encoding="utf-8")
        (self._folder / "pipeline.yaml").write_text(_PIPELINE.format(dataset=_DATASET, url=url), encoding="utf-8")
        for cloud, (region, law) in CLOUDS.items():
            self._say(f"{cloud:<6} {region:<12} {law}  {self._cloud(cloud)}")

    async def _run(self, order_seed: int | None = None) -> RunReport:
        options = RunOptions(self._workers, fresh=True, order_seed=order_seed)
        async with open_world(self._folder / "world.yaml") as world:
            with listing_progress(self._output) as seen:
                planned = await make_plan(world, self._folder / "pipeline.yaml", progress=seen)
            with RunView(self._output) as view:
                result = await run_planned(world, planned, options, begun=view.begun, observe=view.update)
        if result.interrupted:
            raise KeyboardInterrupt
        if result.report.state != "done":
            raise RunStopped(f"the run of the demo ended as {result.report.state}: {result.report.error}")
        return result.report

    async def _verify(self, *, repair: bool = False) -> VerifyReport:
        # Opened anew each time, as separate commands would: nothing is known from before the loss.
        async with open_world(self._folder / "world.yaml") as world:
            version = await resolve(world.coord, _DATASET)
            with byte_progress(self._output, "verify") as bar:

                def told(progress: VerifyProgress) -> None:
                    bar(progress.bytes_done, progress.bytes_total)

                report: VerifyReport = await self._check(
                    world.coord,
                    world.stores,
                    world.sites,
                    version,
                    who=f"{this_holder()} demo",
                    clock=world.clock,
                    repair=repair,
                    progress=told,
                )
        found = ", ".join(
            f"{count} {word}"
            for word, count in (("whole", report.whole), ("missing", report.missing), ("rotten", report.rotten))
            if count
        )
        self._say(f"{report.replicas} replicas of {report.objects} objects, {format_bytes(report.bytes)}: {found}")
        return report

    def _feed(self) -> None:
        """What a researcher writes; and in the middle of the loop the cloud that is being read from goes away."""
        dataset = open_dataset(_DATASET, world=self._folder / "world.yaml", cache=False)
        # So little memory that the epoch can't be read ahead before the cloud is gone.
        with dataset, dataset.loader(32, seed=17, lanes=4, window=1, memory="1MB", format="numpy") as loader:
            lost, before = "", 0
            for step, _batch in enumerate(loader):
                if step == len(loader) // 3:
                    used = max(dataset.traffic(), key=lambda t: t.bytes)
                    lost, before = used.cloud, loader.stats()["blocks_loaded"]
                    self._cloud(lost).rename(self._folder / "unplugged")
                    size = format_bytes(used.bytes)
                    self._say(f"step {step} of {len(loader)}: unplugged {lost}, which {size} came from")
            receipt, stats = loader.receipt(), loader.stats()
            self._say(f"{stats['blocks_loaded'] - before} blocks were read after that, and batches went on")
            for event in [e for e in loader.events if e.kind == "failover"][:2]:
                self._say(event.sentence)
            self._claim(
                f"each of the {len(dataset)} rows was delivered exactly once, in the order that the seed says",
                receipt.complete and receipt.rows == len(dataset) and receipt.proof == loader.expected().proof,
            )
            self._claim(
                f"reading moved to another cloud; no batch waited over 1 s (the longest {stats['waited_max_s']:.3f} s)",
                stats["waited_max_s"] <= 1.0 and any(lost in e.store for e in loader.events if e.kind == "failover"),
            )
            for line in receipt_lines(receipt):
                self._say(line)
        (self._folder / "unplugged").rename(self._cloud(lost))
        self._say(f"{lost} is plugged in again")
        dataset.session.close()

    # --- words ------------------------------------------------------------------------------------

    def _cloud(self, name: str) -> Path:
        return self._folder / "clouds" / name

    def _title(self, text: str) -> None:
        self._step += 1
        self._output.line("")
        self._output.line(f"{self._step}. {text}", style="bold")

    def _say(self, text: str) -> None:
        self._output.line(f"   {text}")

    def _claim(self, text: str, held: bool) -> None:
        self.claims.append(Claim(text, held))
        self._output.line(f"   {'yes' if held else 'NO'}: {text}", style="green" if held else "bold red")

    def _show_findings(self, report: VerifyReport) -> None:
        for finding in report.findings[:3]:
            self._say(f"{finding.verdict} in {finding.store}: {finding.object}")
        if len(report.findings) > 3:
            self._say(f"and {len(report.findings) - 3} more")


def _contents(cloud: Path) -> dict[str, str]:
    """Key to SHA-256 of every object in a local cloud, by reading its files: no code of ours in between."""
    return {
        file.relative_to(cloud).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in ("shards", "manifests")
        for file in sorted((cloud / folder).rglob("*"))
        if file.is_file()
    }
