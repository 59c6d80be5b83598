"""SGLang servers as child processes, spoken to over HTTP: the trainer never imports sglang.

keeper.py   a process between trainer and server: no server outlives its trainer, no key reaches a log
server.py   starts, watches and ends one server
client.py   its HTTP interface: requests in flight, deadlines, answers checked
payload.py  tensors as the server takes them: by shared memory or CUDA handles, one by one or in a flat bucket
engine.py   the rollout engine: the life of a server through the phases of a step
"""
