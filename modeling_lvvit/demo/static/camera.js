// The camera: a live picture, of which one is taken.

const REASONS = {
  NotAllowedError: "The browser was not allowed to use it.",
  NotFoundError: "There is none.",
  NotReadableError: "Another program uses it.",
};

/** Starts the camera, the one that looks away from the user where there are two. */
export async function openCamera(video) {
  if (!navigator.mediaDevices) {
    throw new Error("The camera cannot be used: browsers allow it to pages of https or of this machine (localhost) alone.");
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await video.play();
  } catch (error) {
    closeCamera(video);
    throw new Error(`The camera cannot be used. ${REASONS[error.name] ?? error.message}`);
  }
}

/** Switches the camera off. */
export function closeCamera(video) {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

/** The picture that the camera sees now, as a file without loss. */
export function photo(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
