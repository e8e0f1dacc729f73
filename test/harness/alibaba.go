package harness

import "github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"

// NewAlibaba starts a double of Alibaba Cloud KMS. Every data key that it makes, and every secret that it is asked to wrap, joins the environment's canaries.
func (e *Env) NewAlibaba() *kmsdouble.Double {
	e.TB.Helper()
	return kmsdouble.New(e.TB, kmsdouble.Config{OnSecret: e.Sealed.Add})
}

// AlibabaKey is a provider on the default key of a double, polled every second.
func (e *Env) AlibabaKey(name string, double *kmsdouble.Double) KMSConfig {
	e.TB.Helper()
	e.Sealed.Add("the access key's secret", []byte(kmsdouble.DefaultAccessKeySecret))
	return KMSConfig{Name: name, PollInterval: "1s", Alibaba: &Alibaba{
		Region: double.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: double.Endpoint(), CAFile: double.CAFile(),
		Credentials: AlibabaCredentials{
			Type:                "accessKey",
			AccessKeyIDFile:     e.File("id", []byte(kmsdouble.DefaultAccessKeyID)),
			AccessKeySecretFile: e.File("secret", []byte(kmsdouble.DefaultAccessKeySecret)),
		},
	}}
}
