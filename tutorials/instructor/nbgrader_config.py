"For the course folder: stubs that let a notebook run on, and time enough for it."
c = get_config()  # noqa: F821
c.ClearSolutions.code_stub = {"python": "...  # your code here"}
c.ExecutePreprocessor.timeout = 600
c.CourseDirectory.course_id = "instructvideo_kit"
