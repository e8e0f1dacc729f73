package kubernetes

import (
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

var (
	crds          = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	widgetsGVR    = schema.GroupVersionResource{Group: "stable.example.com", Version: "v1", Resource: "widgets"}
	widgetsObject = map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": "widgets.stable.example.com"},
		"spec": map[string]any{
			"group": "stable.example.com", "scope": "Namespaced",
			"names": map[string]any{"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList"},
			"versions": []any{map[string]any{
				"name": "v1", "served": true, "storage": true,
				"schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
			}},
		},
	}
)

// defineWidgets creates the custom resource definition and waits until it is served.
func (k *stack) defineWidgets(t *testing.T) dynamic.ResourceInterface {
	t.Helper()
	client, err := dynamic.NewForConfig(k.api.Config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Resource(crds).Create(t.Context(), &unstructured.Unstructured{Object: widgetsObject}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("define a custom resource: %v", err)
	}
	resource := client.Resource(widgetsGVR).Namespace("default")
	harness.Eventually(t, 60*time.Second, "the custom resource to be served", func() error {
		_, err := resource.List(t.Context(), metav1.ListOptions{})
		return err
	})
	return resource
}

func (k *stack) widget(name, value string) *unstructured.Unstructured {
	if !k.onlySecret {
		value = k.env.Sealed.Value(value)
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "stable.example.com/v1", "kind": "Widget", "metadata": map[string]any{"name": name}, "spec": map[string]any{"token": value},
	}}
}

func (k *stack) customResource(t *testing.T) {
	ctx := t.Context()
	resource := k.defineWidgets(t)
	created, err := resource.Create(ctx, k.widget("w", "made"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	changed := k.widget("w", "changed")
	changed.SetResourceVersion(created.GetResourceVersion())
	if _, err := resource.Update(ctx, changed, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	want, _, _ := unstructured.NestedString(changed.Object, "spec", "token")
	list, err := resource.List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("list: %v, %v", list, err)
	}
	if got, _, _ := unstructured.NestedString(list.Items[0].Object, "spec", "token"); got != want {
		t.Errorf("the custom resource holds %q, want %q", got, want)
	}
	if got, err := resource.Create(ctx, k.widget("gone", "gone"), metav1.CreateOptions{}); err != nil {
		t.Errorf("create: %v, %v", got, err)
	}
	if err := resource.Delete(ctx, "gone", metav1.DeleteOptions{}); err != nil {
		t.Errorf("delete: %v", err)
	}
}
