"""`python -m paretune` is the command line, where the program `paretune` isn't on the path."""

from paretune.cli import main

if __name__ == "__main__":
    main()
