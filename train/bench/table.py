"""The figures of `kdcache bench` as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.pipeline.process.progress import duration

_READING = {
    "slab": "a view's slab",
    "first epoch": "the slab, and from it shuffled batches",
    "shuffled epoch": "  the same in memory used before",
    "one seek a record": "one seek a record (TinyViT)",
    "one file an image": "one file an image (FKD)",
}


def _ratio_names(loss: str) -> dict[str, str]:
    return {
        "cached_over_ce_step": f"{loss} over ce, a step",
        "cached_over_ce_epoch": f"{loss} over ce, a whole epoch",
        "online_over_cached": "live teacher over cached, a step",
        "student_and_teacher_forward_over_student": "  (student + teacher's forward) / student",
        "online_over_cached_of_that": "  how much of that is reached",
        "cached_over_model_alone": "cached step over the model alone",
        "build_over_bare_teacher": "build over the bare teacher, images/s",
        "build_over_slower_of_bare_teacher_and_images": "  over the slower of that and images alone",
        "shuffled_over_one_seek_a_record": "shuffled reading over one seek a record",
        "shuffled_over_one_file_an_image": "shuffled reading over one file an image",
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures of `bench`, section by section."""
    setup, loss = found["setup"], found["setup"]["loss"]
    steps = {
        "ce": "ce from the cache", "cached": f"{loss} from the cache", "online": f"{loss} with the live teacher",
        "data alone": "  data alone", "model alone": f"  model alone, with {loss}",
        "teacher forward": "  teacher's forward pass alone",
    }  # fmt: skip
    epochs = {"ce": "ce from the cache", "cached": f"{loss} from the cache"}
    built = {name: name for name in found["build_images_per_second"]}
    reading = f"reading {found['reading_records']:,} records of {setup['stored_classes']} classes"
    lines = [
        *_about(found),
        *_section("a training step", "ms", steps, found["step_seconds"], 1000),
        *_section(f"a whole epoch of {found['epoch_steps']} steps", "s", epochs, found["epoch_seconds"]),
        *_section(
            f"a build, batches of {setup['build_batch_size']}", "images/s", built, found["build_images_per_second"]
        ),
        *_section(reading, "records/s", _READING, found["reading_records_per_second"]),
        *_section("ratios", "", _ratio_names(loss), found["ratios"]),
        *_break_even(found["break_even"]),
    ]
    return "\n".join(lines)


def _about(found: Mapping[str, Any]) -> list[str]:
    """What was measured, and on which machine."""
    setup, about = found["setup"], found["machine"]
    numeric = setup["amp"] or "float32"
    return [
        f"{setup['teacher']} -> {setup['student']} on {setup['data']} ({setup['samples']:,} of "
        f"{setup['of_samples']:,} samples), {setup['image_size']} pixels, batches of {setup['batch_size']}",
        f"{about['gpu'] if setup['device'] != 'cpu' else about['processor']}, {about['cores']} cores, "
        f"{found['threads']} threads, {numeric}{', compiled' if setup['compile'] else ''}; torch {about['torch']}, "
        f"kdcache {about['kdcache']}, in {duration(found['seconds'])}",
    ]


def _section(
    title: str, unit: str, rows: Mapping[str, str], figures: Mapping[str, Any], factor: float = 1.0
) -> list[str]:
    """A line a figure, under a title: median, quartiles and rounds."""
    lines = ["", f"{title:44}{unit:>12}   {'quartiles':22}{'rounds':>6}"]
    for name, text in rows.items():
        f = figures[name]
        middle, low, high = (_number(factor * value) for value in (f["median"], *f["quartiles"]))
        lines.append(f"{text:44}{middle:>12}   {low + ' to ' + high:22}{f['rounds']:6}")
    return lines


def _break_even(even: Mapping[str, Any]) -> list[str]:
    cost, saved = duration(even["build_seconds"]), duration(abs(even["seconds_saved_a_student"]))
    paid = (
        f"saves {saved}: paid for after {even['students']:.2f} students"
        if even["students"] is not None
        else f"loses {saved}: never paid for"
    )
    return [
        "",
        f"break-even: {even['views']} views of {even['samples']:,} samples take {cost} to build; a student of "
        f"{even['epochs']} epochs of {even['steps_an_epoch']:,} steps {paid}",
    ]


def _number(value: float) -> str:
    return f"{value:,.{3 if value < 10 else 1 if value < 1000 else 0}f}"
