"""`python -m benchmarks`: run | compare | peers | greedy."""

import sys
from importlib import import_module

COMMANDS = {
    "run": ("benchmarks.run", "time operators and their implementations beside peers and this machine's ceilings"),
    "compare": ("benchmarks.compare", "hold the results of two runs against each other"),
    "peers": ("benchmarks.end_to_end", "time whole sampling runs beside other samplers"),
    "greedy": ("benchmarks.greedy", "time LLaDA's generate beside its drop-in, and kept keys and values"),
}
USAGE = "\n".join(
    ["usage: python -m benchmarks COMMAND …, each with --help", ""]
    + [f"  {name:<9}{what}" for name, (_, what) in COMMANDS.items()]
)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}")
    return import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
