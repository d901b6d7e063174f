"""Cache folders that the processes of a run do not share, such as those of nodes without a common disk.

A shard's name is the hash of its content, so the folders are compared by the names in them, and a shard that some
process does not see is sent to it and written there. Where all see one folder, nothing is sent.
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
    """Say so if not all processes see the first one's folder; call it on every rank."""
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
                "%d of %d processes do not see the first one's %s: each folder gets all log-probs, sent by the process "
                "that has them",
                sees.count(False),
                len(sees),
                folder,
            )


def exchange(folder: Path, accelerator: Accelerator) -> None:
    """Write the shards that other processes have into this one's folder; call it on every rank.

    A shard that its process cannot read is not sent.
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
