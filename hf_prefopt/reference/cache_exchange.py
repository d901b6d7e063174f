"""Exchange cache shards between processes that do not share a folder, such as nodes without a common disk.

The name of a shard is the hash of its content, so comparing file names is enough. A shard that a process does not see
is sent to this process, which writes it to its own folder. If all processes see the same folder, nothing is sent.
"""

import contextlib
import logging
import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from hf_prefopt.reference.cache_store import shards_of, write_file

logger = logging.getLogger(__name__)


def say_whether_shared(folder: Path, accelerator: Accelerator) -> None:
    """Log a warning if some processes do not see the main process's folder; call it on every rank."""
    if accelerator.num_processes == 1:
        return
    (name,) = broadcast_object_list([f"{uuid.uuid4().hex}.tmp"])
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    sees = gather_object([(folder / name).exists()])
    if accelerator.is_main_process:
        (folder / name).unlink(missing_ok=True)
        if not all(sees):
            logger.warning(
                "%d of %d processes do not see the main process's folder %s: missing log-probs will be sent between "
                "processes, so that each folder has all of them",
                sees.count(False),
                len(sees),
                folder,
            )


def exchange(folder: Path, accelerator: Accelerator) -> None:
    """Add the shards that only other processes have to this process's folder. Call this function on every rank.

    A shard that cannot be read is skipped.
    """
    if accelerator.num_processes == 1:
        return
    accelerator.wait_for_everyone()
    names = gather_object([{path.name for path in shards_of(folder)}])
    for name in sorted(set.union(*names) - set.intersection(*names)):
        sender = next(rank for rank, seen in enumerate(names) if name in seen)
        content: bytes | None = None
        if accelerator.process_index == sender:
            with contextlib.suppress(OSError):
                content = (folder / name).read_bytes()
        (content,) = broadcast_object_list([content], from_process=sender)
        if content is not None and name not in names[accelerator.process_index]:
            write_file(folder / name, content)
