"""What of torch.distributed.checkpoint the generated cases reach: its surface by inspection, its rows by drawing.

surface.py                  reach.py                         page.py
torch's own signatures -->  which cases reach an argument -> docs/coverage.md
"""
