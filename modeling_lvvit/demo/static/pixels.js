// Pixels of an image file as a model takes them: red, green and blue planes of float32 values from 0 to 255.

const STRIP_PIXELS = 2 ** 22; // that are read at a time: browsers limit the size of a canvas, phones more than others
const AS_STORED = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };

/**
 * Decodes an image file; only its orientation is applied.
 * @param {Blob} blob
 * @returns {Promise<{values: Float32Array, height: number, width: number}>} values are (3, height, width)
 */
export async function imagePixels(blob) {
  const bitmap = await createImageBitmap(blob, AS_STORED);
  const { height, width } = bitmap;
  const values = new Float32Array(3 * height * width);
  if (!fill(values, bitmap, canvasReader(width))) {
    // A canvas forgets the colors below transparent pixels, which training keeps; a texture does not.
    fill(values, bitmap, textureReader());
  }
  bitmap.close();
  return { values, height, width };
}

/** Writes the planes of an image; returns whether all its pixels are opaque. */
function fill(values, bitmap, read) {
  const { height, width } = bitmap;
  const rows = Math.max(1, Math.floor(STRIP_PIXELS / width));
  const plane = height * width;
  let isOpaque = true;
  for (let top = 0; top < height; top += rows) {
    const rgba = read(bitmap, top, Math.min(rows, height - top));
    for (let source = 0, target = top * width; source < rgba.length; source += 4, target += 1) {
      values[target] = rgba[source];
      values[target + plane] = rgba[source + 1];
      values[target + 2 * plane] = rgba[source + 2];
      isOpaque = isOpaque && rgba[source + 3] === 255;
    }
  }
  return isOpaque;
}

/** Reads rows of an image as RGBA bytes through a canvas. */
function canvasReader(width) {
  const canvas = new OffscreenCanvas(width, 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return (bitmap, top, rows) => {
    canvas.height = rows; // clears it, too
    context.drawImage(bitmap, 0, -top);
    return context.getImageData(0, 0, width, rows).data;
  };
}

/** Reads rows of an image as RGBA bytes through a texture, with the colors of transparent pixels. */
function textureReader() {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new Error("this browser cannot read transparent images; save it without transparency.");
  return (bitmap, top, rows) => {
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA8, bitmap.width, rows);
    gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
    gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
    gl.pixelStorei(gl.UNPACK_SKIP_ROWS, top);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, bitmap.width, rows, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
    gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    const rgba = new Uint8Array(4 * bitmap.width * rows);
    gl.readPixels(0, 0, bitmap.width, rows, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
    if (gl.getError()) throw new Error("it is transparent and too wide for this browser; save it without transparency.");
    gl.deleteTexture(texture);
    return rgba;
  };
}
