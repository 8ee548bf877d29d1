"""Progress lines: on terminals, and on pipes and files."""

import io
import re
import time

import pytest

from edl_jax import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def screen(text):
  """Returns the lines that a terminal shows after it has erased."""
  return [line.split("\r\x1b[K")[-1] for line in text.split("\n")]


def test_progress_piped_prints_plain_lines():
  stream = io.StringIO()
  line = progress.Progress(40, 0, stream)
  line.update(10, {"train/loss": 4.32149, "train/tokens_per_second": 12345})
  line.print("eval done")
  line.update(20, {"train/loss": 4.0})
  line.close()
  text = re.sub(r"ETA \d+:\d\d", "ETA", stream.getvalue())
  assert text == (
    "step 10/40  25%  ETA  loss 4.321  12.3k tokens/s\n"
    "eval done\n"
    "step 20/40  50%  ETA  loss 4\n"
  )


def test_progress_on_a_terminal_rewrites_one_line(monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  stream = Terminal()
  line = progress.Progress(40, 0, stream)
  line.print("start")
  line.update(10, {"loss": 4.0})
  line.update(20, {"loss": 3.0, **{f"term_{i}": 1.0 for i in range(9)}})
  line.print("eval done")
  assert [line[:10] for line in screen(stream.getvalue())] == [
    "start",
    "eval done",
    "step 20/40",
  ]
  assert len(screen(stream.getvalue())[-1]) == 59
  line.close()
  line.print("end")
  assert screen(stream.getvalue())[-2:] == ["end", ""]


def test_eta_leaves_compilation_out(monkeypatch):
  clock = iter([0.0, 100.0, 110.0])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
  stream = io.StringIO()
  line = progress.Progress(1000, 500, stream)
  line.restart(500)  # Compiled.
  line.update(510, {})
  assert stream.getvalue() == "step 510/1000  51%  ETA 8:10\n"  # 490 of 1 s


def seconds_at(monkeypatch, *seconds):
  """Makes the clock read these seconds, one after the other."""
  clock = iter(seconds)
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))


def test_bytes_are_shown_every_ten_seconds(monkeypatch):
  stream = io.StringIO()
  seconds_at(monkeypatch, 0.0, 9.0, 20.0)
  line = progress.BytesProgress("reading", stream=stream)
  line.add(1_000_000)
  assert stream.getvalue() == ""
  line.add(2_000_000)
  line.close(erase=True)
  assert stream.getvalue() == "reading 3.0 MB  0.15 MB/s\n"


def test_bytes_of_a_known_total_have_an_eta(monkeypatch):
  stream = Terminal()
  seconds_at(monkeypatch, 0.0, 50.0, 50.1)
  line = progress.BytesProgress("tokenizing", 4_000_000, stream)
  line.add(1_000_000)
  line.add(1_000_000)  # Too soon to be shown.
  assert screen(stream.getvalue()) == [
    "tokenizing 1.0/4.0 MB  25%  ETA 2:30  0.02 MB/s"
  ]
  line.close(erase=True)
  assert screen(stream.getvalue()) == [""]


def test_parts_of_a_known_total(monkeypatch):
  stream = io.StringIO()
  seconds_at(monkeypatch, 0.0, 20.0, 40.0)
  line = progress.PartsProgress("choosing", 12_000, stream)
  line.add(0)
  line.add(3_000)
  assert stream.getvalue().splitlines() == [
    "choosing 0/12,000 parts  0%  0.00 parts/s",
    "choosing 3,000/12,000 parts  25%  ETA 2:00  75.00 parts/s",
  ]


def test_elapsed_seconds_are_counted_on_a_terminal_and_erased():
  stream = Terminal()
  with progress.elapsed("compiling", stream):
    assert screen(stream.getvalue()) == ["compiling ..."]
    end = time.monotonic() + 20
    while screen(stream.getvalue()) == ["compiling ..."]:
      assert time.monotonic() < end
      time.sleep(0.05)
    (line,) = screen(stream.getvalue())
    assert re.fullmatch(r"compiling \.\.\. [1-9]\d* s", line)
  assert screen(stream.getvalue()) == [""]


def test_elapsed_ends_when_the_block_raises():
  stream = io.StringIO()
  with pytest.raises(ValueError), progress.elapsed("compiling", stream):
    raise ValueError
  assert stream.getvalue() == "compiling ...\n"


def test_formats():
  assert progress.format_duration(3723.4) == "1:02:03"
  assert progress.format_duration(59.7) == "1:00"
  assert progress.format_duration(7) == "0:07"
  assert progress.format_quantity(950) == "950"
  assert progress.format_quantity(12_345) == "12.3k"
  assert progress.format_quantity(15_100_000_000) == "15.1G"


def test_items_are_shown_as_they_are_done(monkeypatch, capsys):
  seconds_at(monkeypatch, 0.0, 10.0, 12.0, 20.0)
  items = {"a": 1, "b": 2, "c": 3}
  assert list(progress.shown("checking", items)) == list(items)
  assert capsys.readouterr().err.splitlines() == [
    "checking 1/3 parts  33%  ETA 0:20  0.10 parts/s",
    "checking 3/3 parts  100%  ETA 0:00  0.15 parts/s",
  ]
