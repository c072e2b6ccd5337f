"""The files and the display of a run, and chains of runs.

folder.py      the folder: config.yaml, files of one JSON object a line, whole files
config_file.py   config.yaml: written, compared on resume, found where the folder lies
lock.py        one process in a folder
fingerprints.py  models.json: what the run's models were
log.py         metrics.jsonl, trackers, listeners and their alarms
callbacks.py   listeners of one run, by the setting `callbacks`
terminal.py    what the terminal shows, in Python as on the command line
progress.py    the steps on it: one line or a bar; Ctrl-C and SIGTERM
sessions.py    what each session ran on and cost
upload.py      the saved model on the hub
results.py     the headline metrics, before and after training
checkpoint.py  checkpoints that are whole or absent
space.py       space on the disk, and what is said where it runs out
parts.py       sharded tensors in a checkpoint; loaded.py a checkpoint that was read; manifest.py its sums
runstate.py    weights and optimisers as tensors and JSON; rng.py random generators
card.py        the model card; usage.py its code
pipeline.py    chains of methods; stages.py what a stage takes from the earlier ones
"""
