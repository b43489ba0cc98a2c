"""A released Glance as the source of images, up to the disk that Nova's code makes of them."""

import json
from pathlib import Path

import pytest

from agents import Lab, disk_bytes, eventually, output_of, run_vmthunder, same
from glance_server import GlanceServer
from openstack_names import base_name
from vmthunder.openstack.glance import GlanceImage
from vmthunder.openstack.sync import Follower

DRIVE = Path(__file__).parent / "nova_drive.py"


pytestmark = pytest.mark.usefixtures("cloud")


def disk(lab: Lab, name: str, seed: int) -> Path:
    path = lab.directory / name
    path.write_bytes(disk_bytes(3 << 20, seed))
    return path


def names(lab: Lab) -> set[str]:
    return {ref["name"] for ref in json.loads(run_vmthunder("images", "--origin", lab.origin, "--json"))}


def sync(lab: Lab, *more: object) -> None:
    run_vmthunder("glance-sync", "--origin", lab.origin, "--once", *more)


def test_nova_boots_what_was_uploaded_raw_or_qcow2_and_never_asks_glance(
    lab: Lab, glance: GlanceServer, nova_python: Path
) -> None:
    raw = disk(lab, "raw", 21)
    qcow2 = lab.directory / "qcow2"
    output_of("qemu-img", "convert", "-c", "-O", "qcow2", raw, qcow2)
    images = [glance.upload(raw, "raw"), glance.upload(qcow2, "qcow2")]
    sync(lab)
    base = lab.directory / "instances" / "_base"
    base.mkdir(parents=True)
    lab.agent(mount=base, nova=True, lookup_timeout_s=2.0)
    for image in images:
        made = json.loads(output_of(nova_python, DRIVE, base.parent, "root", image, "qcow2", 64 << 20).splitlines()[-1])
        assert made["backing-filename"] == str(base / base_name(image))
        assert same(base / base_name(image), raw)


def test_one_image_is_published_by_name_or_id(lab: Lab, glance: GlanceServer) -> None:
    raw = disk(lab, "single", 22)
    image = glance.upload(raw, "raw")
    run_vmthunder("publish", "glance:single", "--origin", lab.origin)
    assert names(lab) == {f"glance-{image}", f"nova-{base_name(image)}"}
    run_vmthunder("publish", f"glance:{image}", "--origin", lab.origin)
    assert "no image nobody" in run_vmthunder("publish", "glance:nobody", "--origin", lab.origin, exit_code=3)
    run_vmthunder("publish", f"glance:{image}", "other", "--origin", lab.origin, exit_code=2)


@pytest.mark.parametrize("attack", ["qcow2 called raw", "backing file", "qcow2 in qcow2", "signed"])
def test_what_nova_would_refuse_or_check_itself_never_resolves(lab: Lab, glance: GlanceServer, attack: str) -> None:
    inner = lab.directory / "inner"
    output_of("qemu-img", "create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", inner, "4M")
    if attack == "qcow2 called raw":
        image, code = glance.upload_unchecked(inner, "raw"), 4
    elif attack == "backing file":
        image, code = glance.upload_unchecked(inner, "qcow2"), 4
    elif attack == "qcow2 in qcow2":
        outer = lab.directory / "outer"
        output_of("qemu-img", "convert", "-f", "raw", "-O", "qcow2", inner, outer)
        image, code = glance.upload_unchecked(outer, "qcow2"), 4
    else:
        image, code = glance.upload(disk(lab, "signed", 23), "raw", img_signature="abc"), 2
    lab.origin.mkdir()
    line = run_vmthunder("publish", f"glance:{image}", "--origin", lab.origin, exit_code=code)
    assert image in line and "Traceback" not in line
    assert not names(lab)


def test_what_glance_stored_wrongly_is_not_published(lab: Lab, glance: GlanceServer) -> None:
    image = glance.upload(disk(lab, "rotten", 24), "raw")
    stored = glance.images / image
    data = bytearray(stored.read_bytes())
    data[1 << 20] ^= 1
    stored.write_bytes(data)
    assert "not those it was uploaded with" in run_vmthunder(
        "publish", f"glance:{image}", "--origin", lab.origin, exit_code=4
    )
    glance.delete(image)


def test_a_deleted_image_is_dropped_after_the_grace_time_and_stays_where_it_is_used(
    lab: Lab, glance: GlanceServer
) -> None:
    raw = disk(lab, "deleted", 25)
    image = glance.upload(raw, "raw")
    run_vmthunder("publish", f"glance:{image}", "--origin", lab.origin)
    base = lab.directory / "instances" / "_base"
    base.mkdir(parents=True)
    agent = lab.agent(mount=base, nova=True, complete_after_s=0.0, lookup_timeout_s=2.0)
    assert same(base / base_name(image), raw)
    glance.delete(image)
    sync(lab)
    assert f"glance-{image}" in names(lab), "its grace time has only begun"
    sync(lab, "--grace", 0)
    assert not names(lab) & {f"glance-{image}", f"nova-{base_name(image)}"}
    copies = agent.state_dir / "materialized"
    eventually(lambda: [each.suffix for each in copies.iterdir()] == [".raw"], "the whole image on this host")
    run_vmthunder("gc", "--origin", lab.origin)
    agent.drop_page_cache()
    assert same(base / base_name(image), raw)


def listed(image: str, left_to_nova: str | None = None) -> GlanceImage:
    return GlanceImage(image, image, "active", "raw", 1, "sha512", "00", left_to_nova)


def test_a_pass_publishes_what_is_new_and_drops_what_was_gone_for_the_grace_time() -> None:
    follower = Follower(grace_s=10)
    plan = follower.plan([listed("a"), listed("b"), listed("c", "it is signed")], {"b", "d"}, now_s=0)
    assert [image.id for image in plan.publish] == ["a"] and plan.drop == []
    assert follower.plan([listed("a")], {"a", "b", "d"}, now_s=9).drop == []
    assert follower.plan([listed("b")], {"b", "d"}, now_s=10).drop == ["d"]
    assert follower.plan([listed("d")], {"b", "d"}, now_s=11).drop == [], "it came back"
    assert follower.plan([], {"d"}, now_s=20).drop == []


def test_what_was_refused_is_not_downloaded_again() -> None:
    follower = Follower(grace_s=10, refused={"a"})
    assert follower.plan([listed("a")], set(), now_s=0).publish == []
