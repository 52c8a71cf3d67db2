"""The parts of a run as they begin and end, for whoever wants to time or mark them.

| span | number | lies in | what it surrounds |
|---|---|---|---|
| plan | | | reveal times, the packing of ticks, their integers as one record |
| tick | model | | one network call with its draw; a CUDA graph's replay has no spans inside |
| transfer | | plan, tick, or none | integers to the device, tokens into and out of their slots |
| body | | tick | hidden rows |
| block | its place | body | a transformer block, of a denoiser that says so |
| attention | | block | |
| head | | tick | the head, the draw and what it writes |
| capture | model | | the capture of a CUDA graph |
| decode | | | a finished text |
"""

from contextlib import AbstractContextManager, nullcontext

_NOTHING = nullcontext()


class Spans:
    """Called with a span's name and number it gives a context manager to surround the part with. This one does nothing.

    Spans of a run nest, and never overlap otherwise.
    """

    def __call__(self, name: str, number: int = 0) -> AbstractContextManager:
        return _NOTHING


SILENT = Spans()
