"""The laws that every part keeps: `pytest --pyargs fedprune_cli.contracts --plugin mine.py` holds a file's parts to them."""
