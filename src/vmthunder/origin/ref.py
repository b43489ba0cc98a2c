"""A ref: which image a name means. Pure; as an object it is JSON (docs/formats.md)."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from vmthunder.errors import CorruptFile, InvalidName
from vmthunder.ids import Buffer, ImageId, ImageName, image_id

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Ref:
    """A published image under its name. Everything but the image id is for people."""

    name: ImageName
    image_id: ImageId
    virtual_bytes: int
    chunk_bytes: int
    allocated_bytes: int
    """Of the source: what is not a hole and not zero."""
    stored_bytes: int
    """Encoded, each chunk once."""
    published_at: str
    """ISO 8601, UTC."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "image_id": self.image_id.hex()}

    def encode(self) -> bytes:
        """The ref as an object; its name is the object's key."""
        fields = self.to_dict()
        del fields["name"]
        return json.dumps({"version": VERSION, **fields}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, name: ImageName, data: Buffer) -> "Ref":
        """Raises CorruptFile."""
        try:
            fields = json.loads(bytes(data))
            if fields.pop("version") != VERSION:
                raise CorruptFile(f"ref of image {name} has a version that is not known here")
            ref = cls(name, image_id(fields.pop("image_id")), **fields)
            sizes = (ref.virtual_bytes, ref.chunk_bytes, ref.allocated_bytes, ref.stored_bytes)
            if not all(type(size) is int and size >= 0 for size in sizes) or type(ref.published_at) is not str:
                raise ValueError("a field has the wrong type")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidName) as error:
            raise CorruptFile(f"ref of image {name} is damaged ({error}); publish the image again") from None
        return ref
