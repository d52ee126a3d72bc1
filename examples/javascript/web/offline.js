/**
 * Service worker: keeps what was fetched, so that the page works without its server.
 *
 * Files of the model carry their hash in the address: what is kept is the file, whatever happens on the server. All
 * else is asked of the server first.
 */

/** @type {any} */
const worker = self;
const KEPT = "edgetune";

worker.addEventListener("install", () => worker.skipWaiting());
worker.addEventListener("activate", (/** @type {any} */ event) => event.waitUntil(worker.clients.claim()));
worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const isOwn = new URL(event.request.url).origin === location.origin;
  if (isOwn && event.request.method === "GET") event.respondWith(answer(event.request));
});

/**
 * @param {Request} request
 * @returns {Promise<Response>}
 */
async function answer(request) {
  const { pathname, searchParams } = new URL(request.url);
  const address = searchParams.has("sha256") ? request.url : pathname;
  const kept = await caches.open(KEPT);
  const known = await kept.match(address);
  if (known && searchParams.has("sha256")) return known;
  try {
    const response = await fetch(request);
    if (response.ok) {
      if (pathname.endsWith("/target.json")) await dropOthers(kept, await response.clone().json());
      await kept.put(address, response.clone());
    }
    return response;
  } catch (error) {
    if (known) return known;
    throw error;
  }
}

/**
 * Forget files of another shipped folder.
 *
 * @param {Cache} kept
 * @param {{files: {sha256: string}[]}} shipped
 */
async function dropOthers(kept, shipped) {
  const current = new Set(shipped.files.map((file) => file.sha256));
  for (const { url } of await kept.keys()) {
    const hash = new URL(url).searchParams.get("sha256");
    if (hash !== null && !current.has(hash)) await kept.delete(url);
  }
}
