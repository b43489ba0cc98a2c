"""Drives the code of a released Nova as its compute service would, without the service. Run by Nova's own Python.

    nova_drive.py INSTANCES_PATH STEP ARGUMENT…

Two things are replaced: privileged functions run in this process, and Glance answers with a local file, or not at all.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from unittest import mock

import nova.conf
import nova.privsep
import nova.privsep.fs
import nova.privsep.path
from nova import context as nova_context
from nova import objects, version
from nova.virt.libvirt import driver, imagebackend, imagecache
from nova.virt.libvirt import utils as libvirt_utils

INSTANCES, STEP, *ARGUMENTS = sys.argv[1:]
CONF = nova.conf.CONF
CONF([], project="nova", version=version.version_string(), default_config_files=[])
CONF.set_override("instances_path", INSTANCES)
nova.privsep.sys_admin_pctxt.set_client_mode(False)
objects.register_all()
CONTEXT = nova_context.get_admin_context()
MAPPING = {"bus": "virtio", "dev": "vda", "type": "disk"}
GLANCE = mock.Mock()
GLANCE.download.side_effect = GLANCE.get.side_effect = AssertionError("Nova asked Glance")


def new_disk(name="disk", kind="qcow2"):
    CONF.set_override("images_type", kind, group="libvirt")
    instance = objects.Instance(context=CONTEXT, uuid=str(uuid.uuid4()), trusted_certs=None)
    os.makedirs(libvirt_utils.get_instance_path(instance))
    return imagebackend.Backend(True).by_name(instance, name, disk_info_mapping=MAPPING)


def tell(disk):
    info = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", disk.path])
    xml = disk.libvirt_info("none", {}).to_xml()
    print(json.dumps(json.loads(info) | {"path": disk.path, "xml": xml, "downloads": GLANCE.download.call_count}))


def root(image, kind, size):
    """What LibvirtDriver._try_fetch_image_cache calls."""
    disk = new_disk(kind=kind)
    disk.cache(
        fetch_func=libvirt_utils.fetch_image,
        context=CONTEXT,
        filename=imagecache.get_cache_fname(image),
        image_id=image,
        size=int(size),
        trusted_certs=None,
    )
    tell(disk)


def download(image, file, size):
    """The same where Glance answers."""
    GLANCE.download.side_effect = lambda *_, dest_path, **__: shutil.copyfile(file, dest_path)
    GLANCE.get.side_effect = None
    GLANCE.get.return_value = {"disk_format": "qcow2", "id": image}
    root(image, "qcow2", size)


def swap():
    disk = new_disk("disk.swap")
    disk.cache(
        fetch_func=driver.LibvirtDriver._create_swap,
        context=CONTEXT,
        filename="swap_16",
        size=16 << 20,
        swap_mb=16,
        safe=True,
    )
    tell(disk)


def precache(image):
    """`openstack aggregate cache image`, as it arrives at a compute node."""
    print(json.dumps(driver.LibvirtDriver.cache_image(mock.Mock(), CONTEXT, image)))


def age(*used):
    """A pass of the cache manager; what is not in use is old."""
    manager = imagecache.ImageCacheManager()
    running = {
        "used_images": {image: (1, 0, ["instance"]) for image in used},
        "instance_names": set(),
        "used_swap_images": set(),
        "used_ephemeral_images": set(),
    }
    base = os.path.join(INSTANCES, "_base")
    for name in os.listdir(base):
        os.utime(os.path.join(base, name), (1, 1))
    with mock.patch.object(manager, "_list_running_instances", return_value=running):
        manager.update(CONTEXT, [])
    print(json.dumps(sorted(os.listdir(base))))


with mock.patch("nova.virt.images.IMAGE_API", GLANCE):
    {"root": root, "download": download, "swap": swap, "precache": precache, "age": age}[STEP](*ARGUMENTS)
