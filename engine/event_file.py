"""TensorBoard's event files. Imported where one is written: a run goes on without tensorboardX."""
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import custom_scalars, scalar, text

from utils import WriteError, escaped, flag_text, markdown_table, writing

LAYOUT = {  # TensorBoard's custom scalars: charts of all tags that begin so
    name: {part: ["Multiline", [f"{part}_{tag}_"]] for part in ("val", "train")}
    for name, tag in (("top-1 (%)", "prec_1"), ("loss", "loss"))}


class EventFile:
    """A TensorBoard event file, which is written at once.

    tensorboardX's SummaryWriter writes in a thread, and waits for it for ever once a full disk has
    ended it. purge_step: TensorBoard drops what earlier files hold from that step on. arguments:
    the run's, which it shows as a text.
    """

    def __init__(self, folder: Path, purge_step: int, arguments: dict):
        self.folder = folder
        with self.writing():
            folder.mkdir(exist_ok=True)
            self.events = EventsWriter(str(folder / "events"))
            self.add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
            table = text("arguments", markdown(arguments))
            for summary in (custom_scalars(LAYOUT), table):
                self.add(Event(step=purge_step, summary=summary))
            self.events.flush()

    def add(self, event: Event) -> None:
        """Add an event, at the present time."""
        event.wall_time = time.time()
        self.events.write_event(event)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write a point of each curve, {tag: value}; raises WriteError where they cannot be."""
        with self.writing():
            for tag, value in values.items():
                self.add(Event(step=step, summary=scalar(tag, value)))
            self.events.flush()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of writing into WriteError, and close the file then."""
        try:
            with writing(self.folder):
                yield
        except WriteError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, of which all is written."""
        with contextlib.suppress(OSError, AttributeError):
            self.events.close()


def markdown(arguments: dict) -> str:
    """Return arguments as a Markdown table."""
    texts = {name: escaped(flag_text(value)) for name, value in arguments.items()}
    return markdown_table(["argument", "value"], sorted(texts.items()))
