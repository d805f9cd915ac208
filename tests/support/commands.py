"""The command line is invoked in this process."""

from typer.testing import CliRunner

from toolkit.cli.main import app


def oracle(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
