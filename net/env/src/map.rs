//! In-memory hash maps whose hash comes from the environment's randomness: keyed by the operating
//! system's seed in production (no flooding), by the run's seed in simulation (no surprise).

use ahash::RandomState;

use crate::Env;

/// A hash map. Its iteration order must reach neither disk, wire nor scheduling.
pub type Map<K, V> = hashbrown::HashMap<K, V, RandomState>;
/// A hash set, under the same rule as [`Map`].
pub type Set<K> = hashbrown::HashSet<K, RandomState>;

/// The hasher for this environment's maps.
pub fn hasher(env: &impl Env) -> RandomState {
    RandomState::with_seeds(env.random(), env.random(), env.random(), env.random())
}

/// An empty map keyed by this environment's randomness.
pub fn new_map<K, V>(env: &impl Env) -> Map<K, V> {
    Map::with_hasher(hasher(env))
}

/// An empty set keyed by this environment's randomness.
pub fn new_set<K>(env: &impl Env) -> Set<K> {
    Set::with_hasher(hasher(env))
}
