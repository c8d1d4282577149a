// Fetches the files of this bundle and compares each with the SHA-256 that bundle.json has of it.

export class BundleError extends Error {}

// {description, files: Map of path → ArrayBuffer}, every file compared. tell(text) hears what is being fetched.
export async function fetchBundle(tell) {
  if (!globalThis.crypto?.subtle) {
    throw new BundleError(
      "This page was opened in a way in which browsers give no SHA-256, so nothing can be checked. " +
        "Open it over https, or on the machine that serves it as http://localhost.",
    );
  }
  const description = parse(await fetchFile("bundle.json"));
  const files = new Map();
  for (const [path, digest] of Object.entries(description.files)) {
    tell(`Fetching ${path}`);
    const content = await fetchFile(path);
    if ((await sha256(content)) !== digest) {
      throw new BundleError(`${path} was changed after the bundle was made. Unpack the bundle again, into an empty folder.`);
    }
    files.set(path, content);
  }
  return { description, files };
}

export function parse(content) {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch (error) {
    throw new BundleError(`A file of the bundle is no JSON (${error.message}). Unpack the bundle again.`);
  }
}

async function fetchFile(path) {
  const address = path.split("/").map(encodeURIComponent).join("/");
  let response;
  try {
    // Past the cache, and into it: all bundles' files have one date, so that a cache would take an older bundle's for these.
    response = await fetch(new URL(address, document.baseURI), { cache: "reload" });
    if (response.ok) return await response.arrayBuffer();
  } catch (error) {
    throw new BundleError(`${path} cannot be fetched (${error.message}). Is the web server still there?`);
  }
  throw new BundleError(`${path} is missing (the web server says ${response.status}). Unpack the bundle again.`);
}

async function sha256(content) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
