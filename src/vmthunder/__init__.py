"""VMThunder: boots many virtual machines at once from one image.

The rooms, from the bottom up; imports go down only (tests/test_layers.py holds the arrows):

* `ids`, `errors`: words everybody uses.
* `image`: chunks, packs and manifests as bytes. Pure.
* `fuse`: the kernel's FUSE protocol, and the keeper that outlives the processes that speak it. Knows no image.
* `swarm`: who uses an image now, and who takes which chunk from whom; the tracker, and a node's membership.
* `peer`: what nodes say to each other.
* `origin`: where images are published, over an object store.
* `publishing`: any disk image into chunks, packs and a manifest at an origin.
* `node`: the agent of a compute host: chunk cache, fetcher, relay, image file system, control socket.
* `vm`: overlays, seeds, QEMU and user-mode Linux on top of a file that the agent shows.
* `sim`: the relay of chunks on paper.
* `lab`: clusters of network namespaces on one machine; boots recorded and replayed.
* `bench`: what it costs, against what people use today.
* `cli`: one module per group of commands.
"""

__version__ = "0.1.0"
