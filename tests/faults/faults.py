"""The four faults: a kill, a full disk, a power cut, two at once. Each returns what went wrong, or ""."""

from __future__ import annotations

import random
import shutil
import time

from harness import Command, Harness
from power_cut import state_after


def kills(harness: Harness, command: Command, chance: random.Random, count: int = 1) -> str:
    """Kill the command at operations drawn by chance, one after the other, and let it go on."""
    operations, out = harness.reference(command)[1].operations, harness.folder()
    points = [chance.randint(1, operations) for _ in range(count)]
    for point in points:
        ended = harness.run(command, out, kill_at=point)
        if ended.code not in (-9, 0):
            return f"{command.name} after {points}: {ended.says}"
    wrong = harness.finish(command, out)
    return f"{command.name} killed at {points}: {wrong}" if wrong else ""


def full_disk(harness: Harness, command: Command, chance: random.Random) -> str:
    """Let the disk be full after so many bytes, then give it room."""
    out = harness.folder()
    room = chance.randint(0, harness.reference(command)[1].written)
    ended = harness.run(command, out, room=room)
    one_line = ended.code == 1 and "No space left on device; make room" in ended.says and str(out) in ended.says
    wrong = "" if ended.code == 0 or one_line else f"said {ended.says}"
    wrong = wrong or ("a traceback" if "Traceback" in ended.printed else harness.finish(command, out))
    return f"{command.name} with room for {room} bytes: {wrong}" if wrong else ""


def power_cut(harness: Harness, command: Command, chance: random.Random) -> str:
    """Cut the power at a moment, and let the command go on with what the disk has then."""
    if command.name not in harness.records:
        recorded = harness.folder()
        harness.records[command.name] = harness.record(command, recorded), recorded
    record, recorded = harness.records[command.name]
    moment, out = chance.randint(1, len(record)), harness.folder()
    state_after(record[:moment], recorded, out, chance)
    kept = harness.folder()
    shutil.copytree(out, kept, dirs_exist_ok=True)
    wrong = harness.finish(command, out)
    if wrong:
        return f"{command.name} cut after {moment} of {len(record)} (in {kept}): {wrong}"
    shutil.rmtree(kept)
    return ""


def two_at_once(harness: Harness, command: Command, chance: random.Random) -> str:
    """Start the command twice, the second after a moment drawn by chance, and once more in the end."""
    out = harness.folder()
    first = harness.start(command, out)
    time.sleep(chance.choice([0, 0.01, 0.1, 0.5]))
    second = harness.start(command, out)
    both = [harness.ended(*started) for started in (first, second)]
    refused = [ended for ended in both if ended.code == 1 and "is writing it" in ended.says]
    wrong = "" if len(refused) + sum(ended.code == 0 for ended in both) == 2 and len(refused) < 2 else "both failed"
    wrong = wrong and f"{[ended.says for ended in both]}"
    wrong = wrong or harness.finish(command, out)
    return f"{command.name} twice: {wrong}" if wrong else ""


FAULTS = {"kills": kills, "full disks": full_disk, "power cuts": power_cut, "two at once": two_at_once}
