package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// surface does with the API server what clients do with it.
func (k *stack) surface(t *testing.T) {
	t.Run("secrets", k.secretOperations)
	t.Run("lists", k.lists)
	t.Run("watches", k.watches)
	t.Run("everything else", k.otherResources)
	t.Run("service account token", k.serviceAccountToken)
	t.Run("custom resource", k.customResource)
}

func (k *stack) client(namespace string) typedcorev1.SecretInterface {
	return k.api.Client.CoreV1().Secrets(namespace)
}

// namespace creates a namespace.
func (k *stack) namespace(t *testing.T, name string) string {
	t.Helper()
	_, err := k.api.Client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create namespace: %v", err)
	}
	return name
}

func (k *stack) secret(name, value string) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"made-by": "test"}},
		Data:       map[string][]byte{"password": []byte(k.env.Sealed.Value(value))},
	}
}

// wants fails the test unless the Secret has the value.
func (k *stack) wants(t *testing.T, secret *corev1.Secret, err error, value string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(secret.Data["password"]); got != k.env.Sealed.Value(value) {
		t.Fatalf("secret %s holds %q, want %q", secret.Name, got, k.env.Sealed.Value(value))
	}
}

func (k *stack) secretOperations(t *testing.T) {
	ctx := t.Context()
	c := k.client(k.namespace(t, "operations"))
	created, err := c.Create(ctx, k.secret("s", "created"), metav1.CreateOptions{})
	k.wants(t, created, err, "created")
	if _, err := c.Create(ctx, k.secret("s", "again"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("create again: %v, want AlreadyExists", err)
	}
	got, err := c.Get(ctx, "s", metav1.GetOptions{})
	k.wants(t, got, err, "created")
	got, err = c.Get(ctx, "s", metav1.GetOptions{ResourceVersion: "0"})
	k.wants(t, got, err, "created")

	changed := got.DeepCopy()
	changed.Data["password"] = []byte(k.env.Sealed.Value("updated"))
	got, err = c.Update(ctx, changed, metav1.UpdateOptions{})
	k.wants(t, got, err, "updated")
	if _, err := c.Update(ctx, changed, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("update of an old version: %v, want Conflict", err)
	}
	same, err := c.Update(ctx, got, metav1.UpdateOptions{})
	k.wants(t, same, err, "updated")
	if same.ResourceVersion != got.ResourceVersion {
		t.Errorf("an update without a change went from version %s to %s", got.ResourceVersion, same.ResourceVersion)
	}

	body := func(value string) []byte {
		data, err := json.Marshal(map[string]any{"stringData": map[string]string{"password": k.env.Sealed.Value(value)}})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	got, err = c.Patch(ctx, "s", types.StrategicMergePatchType, body("patched"), metav1.PatchOptions{})
	k.wants(t, got, err, "patched")
	got, err = c.Patch(ctx, "s", types.MergePatchType, body("merged"), metav1.PatchOptions{})
	k.wants(t, got, err, "merged")
	_, err = c.Patch(ctx, "s", types.JSONPatchType, []byte(`[{"op":"add","path":"/metadata/labels/json","value":"patch"}]`), metav1.PatchOptions{})
	if err != nil {
		t.Errorf("JSON patch: %v", err)
	}

	apply := applycorev1.Secret("applied", "operations").WithStringData(map[string]string{"password": k.env.Sealed.Value("applied")})
	got, err = c.Apply(ctx, apply, metav1.ApplyOptions{FieldManager: "test"})
	k.wants(t, got, err, "applied")
	apply = apply.WithStringData(map[string]string{"password": k.env.Sealed.Value("applied again")})
	got, err = c.Apply(ctx, apply, metav1.ApplyOptions{FieldManager: "test"})
	k.wants(t, got, err, "applied again")
	if _, err := c.Apply(ctx, apply, metav1.ApplyOptions{FieldManager: "other"}); err != nil && !apierrors.IsConflict(err) {
		t.Errorf("apply as another manager: %v", err)
	}

	uid := types.UID("wrong")
	if err := c.Delete(ctx, "s", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}); !apierrors.IsConflict(err) {
		t.Errorf("delete with a wrong UID: %v, want Conflict", err)
	}
	if err := c.Delete(ctx, "s", metav1.DeleteOptions{}); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := c.Get(ctx, "s", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("get after delete: %v, want NotFound", err)
	}
}

func (k *stack) lists(t *testing.T) {
	ctx := t.Context()
	c := k.client(k.namespace(t, "lists"))
	var want []string
	past := ""
	for i := range 25 {
		name := fmt.Sprintf("s%02d", i)
		created, err := c.Create(ctx, k.secret(name, name), metav1.CreateOptions{})
		k.wants(t, created, err, name)
		want = append(want, name)
		if i == 9 {
			past = created.ResourceVersion
		}
	}
	names := func(list []corev1.Secret) []string {
		var all []string
		for i := range list {
			k.wants(t, &list[i], nil, list[i].Name)
			all = append(all, list[i].Name)
		}
		return all
	}
	for name, options := range map[string]metav1.ListOptions{
		"consistent": {}, "any version": {ResourceVersion: "0"}, "by label": {LabelSelector: "made-by=test"},
		"exact version": {ResourceVersion: past, ResourceVersionMatch: metav1.ResourceVersionMatchExact},
	} {
		list, err := c.List(ctx, options)
		if err != nil {
			t.Fatalf("list, %s: %v", name, err)
		}
		expected := want
		if name == "exact version" {
			expected = want[:10]
		}
		if got := names(list.Items); !slices.Equal(got, expected) {
			t.Errorf("list, %s: %v, want %v", name, got, expected)
		}
	}
	var chunked []string
	options := metav1.ListOptions{Limit: 7}
	for chunk := 0; ; chunk++ {
		list, err := c.List(ctx, options)
		if err != nil {
			t.Fatalf("chunk %d: %v", chunk, err)
		}
		if rest := list.RemainingItemCount; list.Continue != "" && (rest == nil || int(*rest) != len(want)-len(chunked)-len(list.Items)) {
			t.Errorf("chunk %d says that %v items remain", chunk, rest)
		}
		chunked = append(chunked, names(list.Items)...)
		if options.Continue = list.Continue; options.Continue == "" {
			break
		}
	}
	if !slices.Equal(chunked, want) {
		t.Errorf("list in chunks: %v, want %v", chunked, want)
	}
	if err := c.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "made-by=test"}); err != nil {
		t.Errorf("delete all: %v", err)
	}
	if list, err := c.List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("list after the end: %v, %v", list, err)
	}
}

func (k *stack) watches(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	c := k.client(k.namespace(t, "watches"))
	var since string
	for _, name := range []string{"a", "b"} {
		created, err := c.Create(ctx, k.secret(name, name), metav1.CreateOptions{})
		k.wants(t, created, err, name)
		if since == "" {
			since = created.ResourceVersion
		}
	}
	yes := true
	stream, err := c.Watch(ctx, metav1.ListOptions{SendInitialEvents: &yes, AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	if err != nil {
		t.Fatalf("watch-list: %v", err)
	}
	defer stream.Stop()
	past, err := c.Watch(ctx, metav1.ListOptions{ResourceVersion: since})
	if err != nil {
		t.Fatalf("watch: %v", err)
	}
	defer past.Stop()

	// next returns an event as "TYPE name value", and bookmarks only if they end the initial list.
	next := func(w watch.Interface) string {
		for {
			select {
			case event, open := <-w.ResultChan():
				secret, ok := event.Object.(*corev1.Secret)
				switch {
				case !open || !ok:
					t.Fatalf("watch ended with %v", event)
				case event.Type == watch.Bookmark && secret.Annotations[metav1.InitialEventsAnnotationKey] == "":
				default:
					return strings.TrimSpace(fmt.Sprintf("%s %s %s", event.Type, secret.Name, strings.TrimPrefix(string(secret.Data["password"]), k.env.Sealed.Value(""))))
				}
			case <-ctx.Done():
				t.Fatal("no event")
			}
		}
	}
	initial := []string{next(stream), next(stream)}
	slices.Sort(initial)
	if !slices.Equal(initial, []string{"ADDED a a", "ADDED b b"}) {
		t.Errorf("watch-list began with %q", initial)
	}
	if event := next(stream); event != "BOOKMARK" {
		t.Errorf("watch-list: %q, want the bookmark that ends the list", event)
	}
	if event := next(past); event != "ADDED b b" {
		t.Errorf("watch from the past: %q", event)
	}
	updated, err := c.Update(ctx, k.secret("a", "changed"), metav1.UpdateOptions{})
	k.wants(t, updated, err, "changed")
	if err := c.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, w := range []watch.Interface{stream, past} {
		if event := next(w); event != "MODIFIED a changed" {
			t.Errorf("watch: %q", event)
		}
		// The deleted object comes from the previous value in etcd.
		if event := next(w); event != "DELETED a changed" {
			t.Errorf("watch: %q", event)
		}
	}
}

func (k *stack) otherResources(t *testing.T) {
	ctx := t.Context()
	c := k.api.Client.CoreV1().ConfigMaps(k.namespace(t, "others"))
	value := k.env.Clear.Value("open")
	_, err := c.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"k": value}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Get(ctx, "c", metav1.GetOptions{}); err != nil || got.Data["k"] != value {
		t.Errorf("config map: %v, %v", got, err)
	}
	if stored := k.stored(t)["/registry/configmaps/others/c"]; stored == nil || !strings.Contains(string(stored.value), value) {
		t.Error("etcd does not hold the config map in clear")
	}
}

// serviceAccountToken checks that a token bound to a Secret is valid only while the Secret can be
// read.
func (k *stack) serviceAccountToken(t *testing.T) {
	ctx := t.Context()
	namespace := k.namespace(t, "accounts")
	accounts := k.api.Client.CoreV1().ServiceAccounts(namespace)
	if _, err := accounts.Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bound, err := k.client(namespace).Create(ctx, k.secret("bound", "bound"), metav1.CreateOptions{})
	k.wants(t, bound, err, "bound")
	// The API server caches a valid token for some seconds, so the test uses tokens that it has not
	// seen.
	var tokens []string
	for range 40 {
		request, err := accounts.CreateToken(ctx, "robot", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: "bound", UID: bound.UID},
		}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		k.env.Sealed.Add("a service account token", []byte(request.Status.Token))
		tokens = append(tokens, request.Status.Token)
	}
	review := func(token string) bool {
		result, err := k.api.Client.AuthenticationV1().TokenReviews().Create(ctx,
			&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return result.Status.Authenticated && result.Status.User.Username == "system:serviceaccount:accounts:robot"
	}
	if !review(tokens[0]) {
		t.Error("the token is not accepted")
	}
	if err := k.client(namespace).Delete(ctx, "bound", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	unseen := tokens[1:]
	harness.Eventually(t, 60*time.Second, "tokens to end with their Secret", func() error {
		if len(unseen) == 0 {
			return fmt.Errorf("%d tokens were accepted after it was deleted: %w", len(tokens)-1, harness.ErrStop)
		}
		token := unseen[0]
		unseen = unseen[1:]
		if review(token) {
			return fmt.Errorf("a token is still accepted")
		}
		return nil
	})
}
