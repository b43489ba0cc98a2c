"""Profiles at an origin, as values. Holds no state; any event loop."""

from vmthunder.errors import NotFound
from vmthunder.ids import ImageId
from vmthunder.origin.origin import Origin
from vmthunder.profile.profile import Profile


async def load(origin: Origin, image_id: ImageId) -> Profile | None:
    """The profile of an image; None if there is none yet.

    Raises:
        CorruptProfile: what is there is no profile of this image.
        OriginUnavailable, NotPermitted
    """
    try:
        data = await origin.profile(image_id)
    except NotFound:
        return None
    return Profile.decode(data, image_id)


async def save(origin: Origin, profile: Profile) -> None:
    """Replace the profile of an image. Raises NotPermitted, NoSpace, OriginUnavailable."""
    await origin.put_profile(profile.image_id, profile.encode())
