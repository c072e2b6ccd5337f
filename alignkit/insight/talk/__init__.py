"""Talking to a model, and to another one beside it.

speaker.py   one model, its conversation so far, its next answer as it is sampled
dialogue.py  the lines that a person types, answered by all of the speakers
opening.py   speakers(): the models of a run, or of names, loaded
"""

from alignkit.insight.talk.dialogue import COMMANDS, converse
from alignkit.insight.talk.opening import speakers
from alignkit.insight.talk.speaker import Speaker

__all__ = ["COMMANDS", "Speaker", "converse", "speakers"]
