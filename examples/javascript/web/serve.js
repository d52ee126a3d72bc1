/**
 * A server for the page, on this machine alone:
 *
 *     node web/serve.js SITE [--port 8080]
 *
 * Any static server will do. These headers isolate the page, which lets ONNX Runtime use threads.
 */

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, resolve, sep } from "node:path";
import { parseArgs } from "node:util";

/** @type {Record<string, string>} */
const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};
const HEADERS = {
  "Cache-Control": "no-cache",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
};

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { port: { type: "string", default: "8080" } },
});
const [site] = positionals;
if (positionals.length !== 1) {
  console.error("usage: node web/serve.js SITE [--port 8080]");
  process.exit(1);
}

/**
 * @param {string} url
 * @returns {string | null} Null: outside of the site.
 */
function pathOf(url) {
  try {
    const { pathname } = new URL(url, "http://localhost");
    const path = resolve(root, `.${decodeURIComponent(pathname)}`, pathname.endsWith("/") ? "index.html" : "");
    return path.startsWith(root + sep) && !path.includes("\0") ? path : null;
  } catch {
    return null; // not a URL
  }
}

const root = resolve(site);
const server = createServer(async (request, response) => {
  const path = pathOf(request.url ?? "/");
  const found = path === null ? null : await stat(path).catch(() => null);
  if (path === null || !found?.isFile()) {
    response.writeHead(404).end();
    return;
  }
  const type = TYPES[extname(path)] ?? "application/octet-stream";
  response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
  createReadStream(path).pipe(response);
});
server.listen(Number(values.port), "127.0.0.1", () => {
  const address = /** @type {import("node:net").AddressInfo} */ (server.address());
  console.log(`http://127.0.0.1:${address.port}/`);
});
