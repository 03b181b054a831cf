/** Small values that a browser keeps for the page; what it does not keep costs nothing else. */

/** Return what a storage holds under a key; null where it is blocked, empty or damaged. */
export function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

/** Store a value; a full or blocked storage forgets it. */
export function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch {
    // The page works on without it.
  }
}
