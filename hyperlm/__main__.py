"""`python -m hyperlm`: the command `hyperlm`."""

from hyperlm.command import main

if __name__ == "__main__":
    main()
