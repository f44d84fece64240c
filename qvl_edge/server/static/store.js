// What stays in this browser: small settings in localStorage, conversations with their pictures in IndexedDB.

export function stored(name) { return localStorage.getItem(`qvl-edge.${name}`); }
export function store(name, value) { localStorage.setItem(`qvl-edge.${name}`, value); }

// The fields of the settings panel that have a value.
export function settings() {
  const given = JSON.parse(stored("settings") ?? "{}");
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== ""));
}

// A conversation has its head, for the list, apart from its turns, which hold pictures.
const HEADS = "heads", TURNS = "turns";

function database() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("qvl-edge", 2);
    opening.onupgradeneeded = () => {
      for (const old of opening.result.objectStoreNames) opening.result.deleteObjectStore(old);
      for (const name of [HEADS, TURNS]) opening.result.createObjectStore(name, { keyPath: "id" });
    };
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => resolve(opening.result);
  });
}

// What `act` returns for both tables; null where there is no storage, as in a private window.
async function transact(mode, act) {
  const opened = await database().catch(() => null);
  if (!opened) return null;
  return new Promise((resolve) => {
    const transaction = opened.transaction([HEADS, TURNS], mode);
    const request = act(transaction.objectStore(HEADS), transaction.objectStore(TURNS));
    const end = (result) => { opened.close(); resolve(result); };
    transaction.oncomplete = () => end(request.result);
    transaction.onabort = () => end(null);
  });
}

// {id, title, changed} of every conversation, the latest first.
export async function conversations() {
  const heads = (await transact("readonly", (heads) => heads.getAll())) ?? [];
  return heads.sort((one, other) => other.changed - one.changed);
}

export async function turnsOf(id) {
  return (await transact("readonly", (heads, turns) => turns.get(id)))?.turns ?? [];
}

export function keep(head, turns) {
  return transact("readwrite", (heads, all) => { heads.put(head); return all.put({ id: head.id, turns }); });
}

export function forget(id) {
  return transact("readwrite", (heads, all) => { heads.delete(id); return all.delete(id); });
}
