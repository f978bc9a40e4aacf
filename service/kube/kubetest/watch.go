package kubetest

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apimachinery/pkg/watch"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// watch streams events until the client leaves, the asked time is over, or the test drops it.
func (s *Server) watch(a *answerer, r *http.Request) {
	q := a.q
	initial, err := s.watchOptions(q)
	if err != nil {
		a.fail(err)
		return
	}
	end := 30 * time.Minute
	if t, err := strconv.Atoi(q.query.Get("timeoutSeconds")); err == nil && t > 0 {
		end = time.Duration(t) * time.Second
	}
	timer := time.NewTimer(end)
	defer timer.Stop()

	a.w.Header().Set("Content-Type", q.out.contentType())
	a.w.WriteHeader(http.StatusOK)
	st := &stream{a: a, flush: http.NewResponseController(a.w)}
	st.frames = q.out.info.StreamSerializer.Framer.NewFrameWriter(a.w)

	s.mu.Lock()
	at, err := s.world.checkVersion(q)
	if err == nil && at != 0 && at < s.world.compacted-1 && !initial {
		err = apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", at, s.world.compacted))
	}
	drops, bookmarks := s.world.drops, s.world.bookmarks
	var first []runtime.Object
	if initial || at == 0 {
		first, at = s.world.list(q), s.world.version
	}
	s.mu.Unlock()
	if err != nil {
		status := err.(apierrors.APIStatus).Status()
		st.send(watch.Error, &status)
		return
	}
	for _, o := range first {
		st.send(watch.Added, o)
	}
	if initial {
		st.bookmark(at, true)
	}
	_ = st.flush.Flush() // headers must go out also when there is nothing to say
	for st.err == nil {
		s.mu.Lock()
		var events []event
		for i := len(s.world.log) - 1; i >= 0 && s.world.log[i].version > at; i-- {
			events = append(events, s.world.log[i])
		}
		changed, dropped, mark := s.world.changed, s.world.drops != drops, s.world.bookmarks != bookmarks
		bookmarks = s.world.bookmarks
		now := s.world.version
		s.mu.Unlock()
		if dropped {
			return
		}
		for i := len(events) - 1; i >= 0; i-- {
			if t, o, seen := events[i].seen(q); seen {
				st.send(t, o)
			}
		}
		at = now
		if mark && q.query.Get("allowWatchBookmarks") == "true" {
			st.bookmark(at, false)
		}
		select {
		case <-changed:
		case <-timer.C:
			return
		case <-r.Context().Done():
			return
		case <-s.stopped.Done():
			return
		}
	}
}

// watchOptions holds the rules for a watch that begins with the present state, and reports whether
// it does.
func (s *Server) watchOptions(q *request) (initial bool, err error) {
	invalid := func(name, msg string) error {
		return apierrors.NewInvalid(schema.GroupKind{Group: metav1.GroupName, Kind: "ListOptions"}, "",
			field.ErrorList{field.Forbidden(field.NewPath(name), msg)})
	}
	send, match := q.query.Get("sendInitialEvents"), q.query.Get("resourceVersionMatch")
	switch {
	case send != "" && s.noWatchList:
		return false, invalid("sendInitialEvents", "sendInitialEvents is forbidden for watch unless the WatchList feature "+
			"gate is enabled")
	case send == "" && match != "":
		return false, invalid("resourceVersionMatch",
			"resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided")
	case send != "" && match != string(metav1.ResourceVersionMatchNotOlderThan):
		return false, invalid("resourceVersionMatch",
			"sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
	}
	return send == "true", nil
}

// stream writes watch events in the negotiated framing.
type stream struct {
	a      *answerer
	frames interface{ Write([]byte) (int, error) }
	flush  *http.ResponseController
	err    error
}

func (st *stream) send(t watch.EventType, o runtime.Object) {
	if st.err != nil {
		return
	}
	f := st.a.q.out
	raw, err := st.a.s.codecs.encode(f, o)
	if err != nil {
		panic(fmt.Sprintf("kubetest: encode %T: %v", o, err))
	}
	frame, err := runtime.Encode(f.info.StreamSerializer.Serializer, &metav1.WatchEvent{Type: string(t),
		Object: runtime.RawExtension{Raw: raw}})
	if err != nil {
		panic(fmt.Sprintf("kubetest: encode a watch event: %v", err))
	}
	if st.a.truncate {
		frame = frame[:len(frame)/2]
	}
	if _, st.err = st.frames.Write(frame); st.err == nil {
		st.err = st.flush.Flush()
	}
}

func (st *stream) bookmark(version uint64, initialEnd bool) {
	m := metav1.ObjectMeta{ResourceVersion: strconv.FormatUint(version, 10)}
	if initialEnd {
		m.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
	}
	switch st.a.q.resource {
	case "pods":
		st.send(watch.Bookmark, &corev1.Pod{ObjectMeta: m})
	case "serviceaccounts":
		st.send(watch.Bookmark, &corev1.ServiceAccount{ObjectMeta: m})
	case "nodes":
		st.send(watch.Bookmark, &corev1.Node{ObjectMeta: m})
	}
}

// Bookmark has every watch that allows them send a bookmark, as the real server does every minute.
func (s *Server) Bookmark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.bookmarks++
	s.world.wake()
}

// DropWatches ends every watch, as a restarting or overloaded server does.
func (s *Server) DropWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.drops++
	s.world.wake()
}

// Compact forgets history: a watch from a version before now is answered with 410 Gone.
func (s *Server) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.version += 10
	s.world.compacted = s.world.version
	s.world.log = nil
}
