"""The `unmask study` command."""

import typer

from unmask.study import evaluate_command, importance_command, search_command

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def study() -> None:
    """Find out which steps a lighter model can take."""


app.command(name="importance", epilog=importance_command.EXAMPLE)(importance_command.importance_command)
app.command(name="evaluate", epilog=evaluate_command.EXAMPLE)(evaluate_command.evaluate_command)
app.command(name="search", epilog=search_command.EXAMPLE)(search_command.search_command)
