"""``python -m loraduct`` is the same as the ``loraduct`` command."""

from loraduct.cli import run

if __name__ == "__main__":
    run()
