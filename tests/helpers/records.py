"""Records of widths, in part."""

import dataclasses


def cut(record, seeds=slice(None), widths=slice(None)):
    """The record of some of the seeds and widths."""
    names = ("rms", "change", "loss", "parameter_norms", "parameter_changes", "effects", "descents")
    parts = {name: getattr(record, name)[widths, seeds] for name in names}
    of_widths = {name: getattr(record, name)[widths] for name in ("widths", "sizes")}
    return dataclasses.replace(record, seeds=record.seeds[seeds], **of_widths, **parts)
