"""`python -m dfq`."""

from dfq.cli import run

if __name__ == "__main__":
    run()
