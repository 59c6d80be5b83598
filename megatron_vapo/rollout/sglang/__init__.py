"""The engine made of SGLang servers, child processes that are reached over HTTP: the trainer never imports sglang.

supervisor.py     a process between trainer and server: no server outlives its trainer, no key reaches a log
server.py         starts, watches and ends one server
launch.py         the arguments it is started with
environment.py    what it inherits, and what it needs beside trainers on a GPU
client.py         its HTTP interface: one request, one answer that is checked
requests.py       many requests in flight: bounded, retried, cut at their time
payload.py        tensors as the server takes them: by shared memory or CUDA handles, one by one or in a flat bucket
update_group.py   the process group that broadcasts weights to servers on other devices
weight_update.py  sends weights by one of three ways
engine.py         the rollout engine: the life of a server through the phases of a step
"""
