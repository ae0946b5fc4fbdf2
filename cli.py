"""The command line: one group of all commands, which lie in train/commands/."""

import click

from kdcache import __version__
from kdcache.pipeline.commandline.commands import Main
from kdcache.train.commands import caches, sharing, students


def _first_to_say(message: str) -> bool:
    from kdcache.train.group import first_to_say

    return first_to_say(message)


@click.group(
    cls=Main,
    commands=[*caches.COMMANDS, *students.COMMANDS, *sharing.COMMANDS],
    first_to_say=_first_to_say,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="kdcache")
def main() -> None:
    """Run a teacher once, keep what students need, train any number of them without it.

    \b
      kdcache build --teacher resnet34
      kdcache train --loss nkd

    Without --data both work on scikit-learn's digits, to try things out.
    """


if __name__ == "__main__":
    main()
