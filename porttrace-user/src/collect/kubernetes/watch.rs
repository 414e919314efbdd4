//! A local copy of what the API says, kept fresh for commands that run long: list, then watch, and list again when the server
//! has forgotten where we were (410 Gone). kube's watcher does that; here its events become our objects.

use super::access::{self, Api, ApiError};
use super::{Options, list};
use crate::core::model::cluster::{Cluster, EndpointSlice, Node, ObjectName, Part, Pod, Service};
use crate::core::parse::notes::Notes;
use crate::core::parse::objects::Objects;
use futures_util::StreamExt;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// How long to wait before the node is asked for again.
const AGAIN: Duration = Duration::from_secs(10);

/// The copy. Its tasks end when it is dropped.
#[derive(Debug)]
pub struct Watch {
    copy: Arc<Copy>,
    _tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Copy {
    stores: Mutex<Stores>,
    changes: AtomicU64,
}

#[derive(Debug, Default)]
struct Stores {
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    pods: Store<Pod>,
    nodes: Store<Node>,
    node: Option<String>,
}

type Store<T> = Part<BTreeMap<ObjectName, T>>;

/// A kind of object that is watched.
trait Watched: Sized + Clone + Send + 'static {
    const GROUP: &'static str;
    const KIND: &'static str;
    const PLURAL: &'static str;
    fn pick(cluster: Cluster) -> Part<Vec<Self>>;
    fn store(stores: &mut Stores) -> &mut Store<Self>;
}

macro_rules! watched {
    ($kind:ty, $group:literal, $name:literal, $plural:ident, $field:ident) => {
        impl Watched for $kind {
            const GROUP: &'static str = $group;
            const KIND: &'static str = $name;
            const PLURAL: &'static str = stringify!($plural);
            fn pick(cluster: Cluster) -> Part<Vec<Self>> {
                cluster.$field
            }
            fn store(stores: &mut Stores) -> &mut Store<Self> {
                &mut stores.$field
            }
        }
    };
}

watched!(Service, "", "Service", services, services);
watched!(EndpointSlice, "discovery.k8s.io", "EndpointSlice", endpointslices, slices);
watched!(Pod, "", "Pod", pods, pods);
watched!(Node, "", "Node", nodes, nodes);

impl Watch {
    /// Starts following. The first answers come later; until then, and while the server refuses, each part says why it is
    /// missing. Needs a tokio runtime.
    ///
    /// # Errors
    /// When there are no credentials to ask with.
    pub async fn start(options: Options) -> Result<Self, ApiError> {
        let api = access::connect(&options).await?;
        let copy = Arc::new(Copy::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(follow::<Service>(api.clone(), copy.clone(), watcher::Config::default()));
        tasks.spawn(follow::<EndpointSlice>(api.clone(), copy.clone(), watcher::Config::default()));
        tasks.spawn(follow_node(api, copy.clone(), options));
        Ok(Self { copy, _tasks: tasks })
    }

    /// Goes up with each change, so that nobody copies without need.
    pub fn changes(&self) -> u64 {
        self.copy.changes.load(Ordering::Acquire)
    }

    /// What is known now.
    pub fn cluster(&self) -> Cluster {
        let stores = self.copy.lock();
        Cluster {
            services: listed(&stores.services),
            slices: listed(&stores.slices),
            pods: listed(&stores.pods),
            nodes: listed(&stores.nodes),
            pods_of: stores.node.clone(),
        }
    }
}

fn listed<T: Clone>(store: &Store<T>) -> Part<Vec<T>> {
    match store {
        Part::Known(known) => Part::Known(known.values().cloned().collect()),
        Part::Missing(why) => Part::Missing(why.clone()),
    }
}

impl Copy {
    fn lock(&self) -> MutexGuard<'_, Stores> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Stores)) {
        change(&mut self.lock());
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// What is missing is missing because of this; what is known stays so, as the last that was heard.
    fn lack<T: Watched>(&self, error: &ApiError) {
        self.change(|stores| {
            let store = T::store(stores);
            if store.known().is_none() {
                *store = Part::Missing(error.to_string());
            }
        });
    }
}

/// Finds out which node this is, as often as it takes, and then follows it and its pods.
async fn follow_node(api: Api, copy: Arc<Copy>, options: Options) {
    let name = loop {
        match list::this_node(&api, &options).await {
            Ok((name, _)) => break name,
            Err(error) => {
                copy.lack::<Pod>(&error);
                copy.lack::<Node>(&error);
                tokio::time::sleep(AGAIN).await;
            }
        }
    };
    copy.change(|stores| stores.node = Some(name.clone()));
    let pods = watcher::Config::default().fields(&list::of_node(&name));
    let node = watcher::Config::default().fields(&format!("metadata.name={name}"));
    tokio::join!(follow::<Pod>(api.clone(), copy.clone(), pods), follow::<Node>(api, copy, node));
}

async fn follow<T: Watched>(api: Api, copy: Arc<Copy>, config: watcher::Config) {
    let kind = GroupVersionKind::gvk(T::GROUP, "v1", T::KIND);
    let resource = ApiResource::from_gvk_with_plural(&kind, T::PLURAL);
    let objects = kube::Api::<DynamicObject>::all_with(api.client.clone(), &resource);
    let mut events = watcher(objects, config).default_backoff().boxed();
    let mut listing = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listing.clear(),
            Ok(Event::InitApply(object)) => listing.extend(read::<T>(object)),
            Ok(Event::InitDone) => {
                let listing = std::mem::take(&mut listing);
                copy.change(|stores| *T::store(stores) = Part::Known(listing));
            }
            Ok(Event::Apply(object)) => {
                // One that is not understood any more is not the old one either.
                let (name, object) = (name_of(&object), read::<T>(object));
                copy.change(|stores| apply(T::store(stores), name, object));
            }
            Ok(Event::Delete(object)) => copy.change(|stores| apply(T::store(stores), name_of(&object), None)),
            Err(error) => copy.lack::<T>(&reason(&api, &error)),
        }
    }
}

fn apply<T>(store: &mut Store<T>, name: ObjectName, object: Option<(ObjectName, T)>) {
    if let Part::Known(known) = store {
        known.remove(&name);
        known.extend(object);
    }
}

fn name_of(object: &DynamicObject) -> ObjectName {
    ObjectName {
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
    }
}

/// Only what the model has a field for is kept.
fn read<T: Watched>(object: DynamicObject) -> Option<(ObjectName, T)> {
    let name = name_of(&object);
    let mut value = serde_json::to_value(object).ok()?;
    // Items of a list do not name their kind.
    value.as_object_mut()?.insert("kind".to_owned(), T::KIND.into());
    let mut objects = Objects::default();
    objects.add(&value, &mut Notes::new(T::KIND));
    match T::pick(objects.cluster("")) {
        Part::Known(found) => found.into_iter().next().map(|object| (name, object)),
        Part::Missing(_) => None,
    }
}

fn reason(api: &Api, error: &watcher::Error) -> ApiError {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => api.error(error),
        watcher::Error::WatchError(status) => api.error(&kube::Error::Api(status.clone())),
        error @ watcher::Error::NoResourceVersion => api.nonsense(&error.to_string()),
    }
}
